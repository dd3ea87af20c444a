"""README and docs/ are correct: snippets and commands run, figures are current, links are valid.

Code blocks with ```python or ```sh are run unchanged, those of a page in their order. A comment on the line above
marks exceptions: `<!-- slow -->` is run by `make test-slow`; `<!-- needs: FILES -->` too, with other rows in the place
of files that a reader must fetch; `<!-- not run: WHY -->` is not run. A command that would train for minutes gets more
options that shorten it (`hurried`).
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from mutation import ROOT, failures, mutated, replaced, source_of
from small import write_rows

import minipref
from minipref import metrics, synthetic
from minipref.data import character_counts, read_pairs
from minipref.model import attention_scores, distance_buckets, relative_index

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
RUN = ["README.md", "docs/attention.md", "docs/fast-attention.md", "docs/training.md", "docs/kaggle.md",
       "docs/exercises.md", "docs/solutions.md", "docs/glossary.md", "docs/troubleshooting.md"]
HURRY = "--limit 160 --epochs 1 --precision fp32"
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.S | re.M)


class Fence(NamedTuple):
    page: str
    line: int             # of its first line of text, from 1
    mark: str
    kind: str
    text: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, kind: str | None = None) -> list[Fence]:
    text = text_of(page)
    found = [Fence(page, text[:m.start("text")].count("\n") + 1, m["mark"] or "", m["kind"], m["text"])
             for m in FENCE.finditer(text)]
    return [fence for fence in found if kind in (None, fence.kind)]


def module(path: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# Snippets.

@pytest.fixture
def at_root(monkeypatch):
    """Run a page's snippets in the repository's root, and restore torch's defaults."""
    monkeypatch.chdir(ROOT)
    before, state = torch.get_default_dtype(), torch.get_rng_state()
    yield
    torch.set_default_dtype(before)
    torch.set_rng_state(state)


def run_snippets(page: str) -> dict:
    """Run a page's unmarked python blocks in one namespace, which is returned; errors name the page's line."""
    names = {}
    for fence in fences(page, "python"):
        if not fence.mark:
            exec(compile("\n" * (fence.line - 1) + fence.text, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ["docs/attention.md", "docs/fast-attention.md", "docs/training.md"])
def test_every_snippet_of_the_page_runs_and_its_assertions_hold(page, at_root):
    assert len(fences(page, "python")) >= 8
    run_snippets(page)


def test_the_dozen_lines_of_the_readme_are_disentangled_attention(at_root):
    generator = torch.Generator().manual_seed(0)
    q, k, pos_q, pos_k = (torch.randn(shape, generator=generator, dtype=torch.float64)
                          for shape in [(2, 3, 20, 6)] * 2 + [(3, 16, 6)] * 2)
    found = run_snippets("README.md")["scores"](q, k, pos_q, pos_k, position_buckets=8, max_distance=24)
    terms = attention_scores(q, k, pos_q, pos_k, relative_index(distance_buckets(20, 8, 24)))
    assert torch.allclose(found, sum(terms))


def test_every_fence_is_run_or_says_why_not():
    for page in RUN:
        text = text_of(page)
        assert text.count("```") == 2 * len(fences(page)), f"{page}: a fence that is not read"
        for fence in fences(page):
            assert fence.kind in ("python", "sh", "diff", ""), f"{page}:{fence.line}: a fence of {fence.kind}"
            assert re.fullmatch(r"|slow|needs: .+|not run: .+|printed by: .+", fence.mark), f"{page}:{fence.line}"


# Links and names.

def anchors(text: str) -> set[str]:
    """The anchors of a page's headings on GitHub."""
    found = set()
    for heading in re.findall(r"^#+ +(.*?)\s*$", FENCE.sub("", text), re.M):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.add(next(name for n in range(100) if (name := f"{words}-{n}" if n else words) not in found))
    return found


def links(page: str) -> list[tuple[str, str]]:
    """(text, target) of every link and picture of a page, without code blocks."""
    return re.findall(r"\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)", FENCE.sub("", text_of(page)))


@pytest.mark.parametrize("page", [*PAGES, "weights/README.md", "weights/minipref-tiny/README.md"])
def test_every_relative_link_and_anchor_leads_somewhere(page):
    for _, target in links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert file.resolve().is_relative_to(ROOT), f"{page}: {target} is outside the project"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def defined_in(path: Path) -> set[str]:
    """Functions, classes, `Class.method` and constants of a Python file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", RUN)
def test_every_function_that_is_named_is_in_the_file_that_the_link_leads_to(page):
    named = [(text.strip("`"), target) for text, target in links(page)
             if target.endswith(".py") and re.fullmatch(r"`[A-Za-z_.]+`", text) and not text.strip("`").endswith(".py")]
    for name, target in named:
        assert name in defined_in((ROOT / page).parent / target), f"{page}: {name} is not in {target}"
    assert len(named) >= {"docs/attention.md": 10, "docs/fast-attention.md": 5, "docs/training.md": 10}.get(page, 0)


def test_nothing_in_minipref_is_missing_from_the_reading_order():
    for path in sorted((ROOT / "minipref").iterdir()):
        if path.name not in ("__init__.py", "__pycache__"):
            assert path.name in minipref.__doc__, f"minipref's docstring lacks {path.name}"


PROGRAMS = {"train.py": ["train.py", "minipref/recipes.py"], "predict.py": ["predict.py", "minipref/predictor.py"],
            "-m minipref.explain": ["minipref/explain/__main__.py", "minipref/predictor.py"],
            "-m minipref.hub": ["minipref/hub.py"]} | {
    f"-m minipref.{name}": [f"minipref/{name}/__main__.py"] for name in ("pretrain", "synthetic")}  # with their options


def test_every_option_and_target_of_a_command_exists():
    """On all pages, also in running text: `train.py --x` needs an option --x, `make x` a target x."""
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    commands = 0
    for page in PAGES:
        text = text_of(page)
        for line in [*re.findall(r"`([^`\n]+)`", text), *(line for f in fences(page) for line in f.text.split("\n")),
                     *re.findall(r"^    (\S.*)$", text, re.M)]:
            line = line.split(" #")[0]
            for program, files in PROGRAMS.items():
                if re.search(rf"(python|^) ?{re.escape(program)}( |$)", line):
                    commands += 1
                    for option in re.findall(r" (--[a-z-]+)", line.split(program, 1)[1]):
                        field = option[2:].replace("-", "_")                            # of recipes.TrainConfig
                        known = any(re.search(rf'"(--)?{option[2:]}"|^    {field}: ', source_of(file), re.M)
                                    for file in files)
                        assert known or option == "--help", f"{page}: {program} has no option {option}"
            if re.match(r"make [a-z]", line):
                commands += 1
                for target in re.sub(r'[A-Z]+=("[^"]*"|\S+)', "", line.removeprefix("make ")).split():
                    assert target in targets, f"{page}: make has no target {target}"
    assert commands > 30


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_is_named_is_here(page):
    named = set(re.findall(r"\b(?:benchmarks|tests)/\w+\.py\b", text_of(page)))
    assert [script for script in sorted(named) if not (ROOT / script).is_file()] == []


def test_the_pages_stay_short():
    """README without its code blocks; docs/ as `wc -w` counts."""
    assert len(FENCE.sub("", text_of("README.md")).split()) <= 1200
    assert sum(len(text_of(page).split()) for page in PAGES if page != "README.md") <= 20_000


# Figures and tables.

def test_figures_tables_and_the_notebook_are_what_make_docs_makes():
    build = module("docs/build.py")
    assert [why for path, text in build.build().items() if (why := build.drift(path, text))] == []


def test_the_experiments_page_has_the_tables_that_it_marks_and_no_others():
    build = module("docs/build.py")
    text = build.experiments("Before.\n<!-- autoj -->\n<!-- /autoj -->\nAfter.\n")
    assert text.startswith("Before.\n<!-- autoj -->\n| | log loss |") and text.endswith("<!-- /autoj -->\nAfter.\n")
    assert build.experiments("no marks\n") == "no marks\n"


def test_drift_is_noticed():
    build = module("docs/build.py")
    for path in ("docs/figures/buckets.svg", "docs/figures/head.svg", "docs/kaggle.ipynb", "README.md"):
        text = text_of(path)
        assert build.drift(path, text) == "" and path in build.drift(path, text.replace("the", "teh").replace("d", "b"))
    head = text_of("docs/figures/head.svg")
    assert len(build.shades(head)) > 500
    shade = next(n for n in range(2, 9) if f'class="s{n}"' in head and f'class="s{n + 1}"' in head)
    one_up = re.sub(r'class="s(\d+)" d', lambda m: f'class="s{int(m[1]) + 1}" d', head, count=1)
    assert build.drift("docs/figures/head.svg", one_up) == ""            # rounding on another processor
    moved = head.replace(f'class="s{shade}" d', f'class="s{shade + 2}" d')
    assert "head.svg" in build.drift("docs/figures/head.svg", moved)
    assert "is missing" in build.drift("docs/figures/none.svg", "")


def test_the_notebook_has_every_cell_of_its_source():
    cells = json.loads(text_of("docs/kaggle.ipynb"))["cells"]
    source = text_of("docs/kaggle_notebook.py")
    assert len(cells) == source.count("# %%") and cells[0]["cell_type"] == "markdown"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(text in source for text in code)
    assert sorted(line for text in code for line in text.split("\n") if line) == sorted(
        line for part in source.split("# %%")[1:] if not part.startswith(" [markdown]") for line in part.split("\n")
        if line)


@pytest.fixture
def notebook(tmp_path):
    """A function that runs all cells with a folder `input` that contains the project and rows; returns the result."""
    inputs = tmp_path / "input"
    (inputs / "project").mkdir(parents=True)
    for name in ("train.py", "predict.py", "minipref", "weights"):
        (inputs / "project" / name).symlink_to(ROOT / name)
    write_rows(inputs / "train.csv", 60)
    write_rows(inputs / "test.csv", 12, seed=1, labels=False)
    cells = json.loads(text_of("docs/kaggle.ipynb"))["cells"]
    script = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")

    def executed(work: str, **settings: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"NOTEBOOK_INPUT": str(inputs), "NOTEBOOK_WORK": str(tmp_path / work),
                                    "NOTEBOOK_TRAIN_OPTIONS": "--epochs 1 --precision fp32"} | settings
        return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=600)

    return executed


def submitted(done: subprocess.CompletedProcess, work: Path) -> np.ndarray:
    """The probabilities of a notebook's submission."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "explain.html").is_file()
    frame = pd.read_csv(work / "submission.csv", dtype={"id": str})
    assert len(frame) == 12 and abs(frame.iloc[:, 1:].sum(axis=1) - 1).max() < 1e-6
    return frame.iloc[:, 1:].to_numpy()


@pytest.mark.slow
def test_the_notebook_rehearses_only_when_asked_to(notebook, tmp_path):
    done = notebook("without")
    assert done.returncode and "no encoder below" in done.stderr and not (tmp_path / "without").exists()
    submitted(done := notebook("work", NOTEBOOK_REHEARSAL="1"), tmp_path / "work")
    assert f"to be trained from {tmp_path / 'input/project/weights/minipref-tiny'}" in done.stdout
    assert (tmp_path / "work/run/report.html").is_file()


@pytest.mark.slow
def test_the_notebook_trains_folds_averages_them_and_skips_training_the_second_time(notebook, encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "input" / "an encoder")
    options = "--recipe tiny --epochs 1 --precision fp32 --folds 2"
    first = submitted(notebook("work", NOTEBOOK_TRAIN_OPTIONS=options), tmp_path / "work")
    for fold in ("fold-1", "fold-2"):
        shutil.copytree(tmp_path / "work/run" / fold / "model", tmp_path / "input" / fold)
    done = notebook("again")
    assert f"{tmp_path / 'input/fold-1'}, {tmp_path / 'input/fold-2'}" in done.stdout
    assert np.allclose(submitted(done, tmp_path / "again"), first, atol=1e-6)
    assert not (tmp_path / "again" / "run").exists()


@pytest.mark.slow
def test_the_notebook_stops_at_an_encoder_that_it_cannot_use(notebook, encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "input" / "theirs")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    done = notebook("work")
    assert done.returncode and f"{folder} has pytorch_model.bin" in done.stderr and "make weights" in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_the_notebook_runs_as_two_processes(notebook, encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "input" / "an encoder")
    alone, both = (submitted(notebook(name, NOTEBOOK_PROCESSES=name), tmp_path / name) for name in ("1", "2"))
    assert np.allclose(alone, both, atol=0.05)


def run(command: list[str], folder: Path, **settings: str) -> str:
    """The output of a command, which must succeed. Variables of a surrounding `make` are removed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    done = subprocess.run(command, cwd=folder, env=environment | settings, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# Exercises.

def breaking() -> list[tuple[str, str, str, str, str]]:
    """(heading, file, correct lines, wrong lines, test) of the exercises that introduce a mistake."""
    parts = re.split(r"^## ", text_of("docs/exercises.md"), flags=re.M)[1:]
    found = []
    for part in parts:
        change = re.search(r"^```diff\n(\S+)\n(.*?)^```", part, re.S | re.M)
        if change:
            lines = change[2].splitlines()
            right, wrong = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            test = re.search(r"-m pytest (tests/\S+::\S+)$", part, re.M)[1]
            found.append((part.split("\n")[0], change[1], right, wrong, test))
    return found


def test_there_are_a_dozen_exercises_each_with_its_command():
    parts = re.split(r"^## ", text_of("docs/exercises.md"), flags=re.M)[1:]
    assert [int(part.split(".")[0]) for part in parts] == list(range(1, 13))
    assert all("```sh\n.venv/bin/python " in part for part in parts) and len(breaking()) == 7
    for _, file, right, _, _ in breaking():
        assert source_of(file).count(right) == 1, f"{file} no longer has: {right}"


@pytest.mark.slow
@pytest.mark.parametrize("exercise", breaking(), ids=[exercise[0] for exercise in breaking()])
def test_the_test_that_an_exercise_names_fails_after_the_change_and_only_then(exercise):
    _, file, right, wrong, test = exercise
    with mutated(file, replaced(file, right, wrong)):
        assert failures([test]), f"{test} did not notice"
    assert failures([test]) == {}


ANSWERS = {  # exercise: (a right answer, a wrong one, the message for the wrong one)
    "buckets": ("from minipref import log_bucket",
                "def log_bucket(d, span, most):\n    return d.clamp(1 - span, span - 1)", "are in another bucket"),
    "adamw": ("from minipref import AdamW", "from torch.optim import Adam as AdamW", "after step 1"),
    "temperature": ("from minipref.metrics import fit_temperature",
                    "def fit_temperature(logits, labels):\n    return 1.0", "log loss is"),
    "attention": ("from minipref.fast.attention import blockwise_attention as attention",
                  "from minipref.fast.attention import blockwise_attention\n"
                  "def attention(q, k, v, pos_q, pos_k, attention_mask, rows):\n"
                  "    return blockwise_attention(q, k, v, pos_k, pos_q, attention_mask, rows)", "differs by"),
    "head": ("def head():\n    return HEAD", "def head():\n    return HEAD[0] % 4 + 1, HEAD[1]", "another gives it"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_answer_is_called_right_and_a_wrong_one_is_told_what_is_wrong(name, tmp_path, capsys):
    exercises = module("docs/exercises.py")
    right, wrong, said = ANSWERS[name]
    mine = tmp_path / "mine.py"
    if name == "head":
        heads = [(layer, number) for layer in range(1, 5) for number in range(1, 4)]
        accepted = []
        for pair in heads:
            mine.write_text(f"def head():\n    return {pair}\n")
            accepted += [pair] if exercises.main(["head", str(mine)]) == 0 else []
        assert len(accepted) == 1
        right, wrong = (text.replace("HEAD", str(accepted[0])) for text in (right, wrong))
    mine.write_text(right)
    assert exercises.main([name, str(mine)]) == 0 and "right: " in capsys.readouterr().out
    mine.write_text(wrong)
    assert exercises.main([name, str(mine)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("not yet: ") and said in out and out.count("\n") == 1


def parts_of(page: str) -> dict[str, str]:
    """The text under each numbered heading of a page, by its number."""
    return {part.split(".")[0]: part for part in re.split(r"^## ", text_of(page), flags=re.M)[1:]}


def solutions() -> dict[str, str]:
    """The programs of docs/solutions.md, by the name under which exercises.py checks them."""
    exercises, answers = parts_of("docs/exercises.md"), parts_of("docs/solutions.md")
    names = {number: check[1] for number, part in exercises.items()
             if (check := re.search(r"docs/exercises\.py (\w+) mine\.py", part))}
    return {name: re.search(r"^```python\n(.*?)^```", answers[number], re.S | re.M)[1]
            for number, name in names.items()}


def test_every_exercise_has_its_solution():
    asked, solved = ([part.split("\n")[0] for part in parts_of(f"docs/{page}.md").values()]
                     for page in ("exercises", "solutions"))
    assert asked == solved and solutions().keys() == ANSWERS.keys()


@pytest.mark.parametrize("name", ANSWERS)
def test_every_solution_is_right(name, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")                                  # as when exercises.py is the script
    (tmp_path / "mine.py").write_text(solutions()[name], encoding="utf-8")
    assert module("docs/exercises.py").main([name, str(tmp_path / "mine.py")]) == 0, capsys.readouterr().out


def test_an_answer_that_fits_the_definition_has_to_fit_transformers_too(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    exercises = module("docs/exercises.py")
    (tmp_path / "mine.py").write_text("from minipref.fast.attention import blockwise_attention as attention\n")
    assert exercises.main(["attention", str(tmp_path / "mine.py")]) == 0
    assert "and a model with it matches transformers" in capsys.readouterr().out
    with pytest.raises(exercises.NotYet, match="not transformers"):
        exercises.parity(lambda q, k, v, *others: v)


@pytest.mark.parametrize(("arguments", "said"), [([], "one of buckets"), (["nothing", "mine.py"], "one of buckets"),
                                                 (["buckets", "no.py"], "no such file"), (["adamw", "HERE"], "AdamW")])
def test_nothing_to_check_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("x = 1\n")
    arguments = [str(tmp_path / "mine.py") if part == "HERE" else part for part in arguments]
    assert module("docs/exercises.py").main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# Commands.

@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project after `make setup`: no runs, no data, only the bundled encoder."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("README.md", "Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt", "train.py",
                 "predict.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("minipref", "docs", "benchmarks", "tests", "weights/minipref-tiny"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for stamp in ("runtime", "dev"):                       # newer than the requirements: make installs nothing
        (folder / ".venv" / stamp).touch()
    return folder


def hurried(command: str) -> str:
    """The command with additional options that reduce its time to seconds."""
    command = command.split("#")[0].strip()
    if command.startswith("make train"):
        options = re.findall('ARGS="(.*)"', command)
        return f'make train ARGS="{" ".join([*options, HURRY])}"'
    return f"{command} {HURRY}" if "python train.py" in command and "--resume" not in command else command


def run_fence(fence: Fence, folder: Path) -> str:
    """The output of a code block's commands, run in `folder`; the synthetic test rows are cut to a dozen."""
    printed = []
    for line in fence.text.strip().split("\n"):
        test_rows = folder / "data" / "synthetic" / "test.csv"
        if test_rows.is_file() and "train" not in line:
            pd.read_csv(test_rows, dtype=str, keep_default_na=False).head(12).to_csv(test_rows, index=False)
        printed.append(run(["bash", "-ec", hurried(line)], folder))
    return "".join(printed)


def sh_fences(mark: str) -> list[Fence]:
    return [fence for page in RUN for fence in fences(page, "sh") if fence.mark.startswith(mark)]


def shape(line: str) -> str:
    """A line of output with its numbers, and text that depends on them, replaced by placeholders."""
    line = re.sub(r"-?\d[\d,.]*(e-?\d+)?", "#", line.replace("NOT better", "Better"))
    return re.sub(r"\s+", " ", re.sub(r"^ended: .*", "ended:", line)).removesuffix(" best").strip()


@pytest.mark.slow
def test_every_command_of_the_readme_runs_and_prints_what_the_readme_says(checkout):
    printed = {}
    for fence in fences("README.md"):
        if fence.mark == "slow" and fence.kind == "sh":
            printed[fence.text.strip()] = run_fence(fence, checkout)
        elif fence.mark == "slow":
            run([sys.executable, "-W", "error", "-c", fence.text], checkout)
        elif fence.mark.startswith("printed by"):
            lines = {shape(line) for line in printed[fence.mark.removeprefix("printed by: ")].splitlines()}
            for line in fence.text.splitlines():
                assert line == "..." or shape(line) in lines, f"not printed: {line}"
    assert len(printed) >= 2
    assert (checkout / "submission.csv").read_text().startswith("id,winner_model_a,winner_model_b,winner_tie\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if page not in ("README.md", "docs/exercises.md")])
def test_every_other_command_of_a_page_runs(page, checkout):
    for fence in fences(page, "sh"):
        if fence.mark in ("", "slow"):
            run_fence(fence, checkout)


SMALL = "--width 32 --heads 2 --layers 2 --feed-forward 64"
FOUR_STEPS = ("--heldout-share 0.1 --length 24 --long-length 48 --batch-tokens 96 --steps 4 --warmup 1 "
              "--evaluations 1 --precision fp32")
PRETRAINING = [(page, line) for page in ("docs/pretraining.md", "docs/experiments.md",
                                         "weights/minipref-tiny/README.md")
               for line in re.findall(r"^    python -m minipref\.pretrain (.*)$", text_of(page), re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [line for _, line in PRETRAINING], ids=[line for _, line in PRETRAINING])
def test_every_pretraining_command_makes_an_encoder(arguments, tmp_path, monkeypatch):
    """The commands of the pages on a few hundred lines of text, with options that reduce them to four small steps."""
    from minipref.pretrain.__main__ import main
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "CORPUS").mkdir()
    pairs = synthetic.train_and_test(train_rows=300, test_rows=10)[0].frame
    (tmp_path / "CORPUS" / "text.txt").write_text("\n\n".join(pairs["response_a"]), encoding="utf-8")
    arguments = arguments.replace("runs/pretrain/model", "weights/minipref-tiny")    # what the first command makes
    begun = "--encoder" in arguments                                    # which has its own sizes and vocabulary
    sizes = "" if begun else SMALL if "--tokenizer" in arguments else f"{SMALL} --vocab-size 350"
    threads = torch.get_num_threads()
    try:
        assert main(f"{arguments} {FOUR_STEPS} {sizes}".split()) == 0
    finally:
        torch.set_num_threads(threads)
    output = arguments.split("--output ")[1].split()[0]
    assert minipref.load_encoder(tmp_path / output / "model").config.num_hidden_layers == (4 if begun else 2)


@pytest.mark.slow
def test_make_pretrain_makes_an_encoder(checkout):
    rows = synthetic.train_and_test(train_rows=300, test_rows=10)[0].frame
    (checkout / "texts").mkdir()
    (checkout / "texts" / "text.txt").write_text("\n\n".join(rows["response_a"]), encoding="utf-8")
    run(["make", "pretrain", "CORPUS=texts", f"ARGS=--output made {FOUR_STEPS} {SMALL} --vocab-size 350"], checkout)
    assert minipref.load_encoder(checkout / "made" / "model").config.num_hidden_layers == 2


def few(command: str) -> str:
    """A command of docs/experiments.md with additional options that reduce its time to seconds."""
    command = re.sub(r"\w+=\S+/model", "again=weights/minipref-tiny", command)      # encoders that a reader pretrains
    if "experiments.py" in command:
        own = re.search(r"--options '(.*?)'", command)
        return f"{command} --seeds 1 --options '{own[1] if own else ''} {HURRY}'"
    if "minipref.synthetic" in command:
        return f"{command} --rows 50 --test-rows 20"
    return command if "predict.py" in command else f"{command} {HURRY}"


@pytest.mark.slow
def test_every_command_of_the_experiments_runs(checkout):
    """With synthetic rows in place of the files that a reader must fetch, and one seed."""
    text = " ".join(text_of("docs/experiments.md").split())    # a command may run over a line's end
    commands = re.findall(r"`python ((?:train\.py|predict\.py|benchmarks/|-m )[^`]*)`", text)
    assert len(commands) > 4 and {command.split()[0] for command in commands} == {"benchmarks/experiments.py", "-m"}
    for seed, name in (1, "autoj"), (3, "llmeval2"), (5, "train"):
        shutil.rmtree(checkout / "s", ignore_errors=True)
        paths = synthetic.write_dataset(checkout / "s", train_rows=160, test_rows=40, train_seed=seed)
        shutil.copy(paths["train"], checkout / f"{name}.csv")
    shutil.copy(paths["test_labelled"], checkout)
    for command in sorted(set(commands)):
        run(["bash", "-ec", f".venv/bin/python {few(command)}"], checkout)


@pytest.mark.parametrize(("target", "script"), [
    ("kill", "tests/killing.py"), ("bench", "benchmarks/bench.py"), ("parity", "benchmarks/parity.py"),
    ("same-numbers", "benchmarks/same_numbers.py"),
    ("weights", "-m minipref.hub weights"), ("data", "-m minipref.hub data")])
def test_make_runs_the_script_that_other_tests_run(target, script):
    """Targets that take minutes or fetch files are tested as scripts; this tests that `make` passes options to them."""
    out = run(["make", "--dry-run", "--no-print-directory", target, "ARGS=--one --two"], ROOT)
    assert f".venv/bin/python {script} --one --two" in out.splitlines()


def test_make_bench_measures_the_peers_too_and_writes_the_page():
    lines = run(["make", "--dry-run", "--no-print-directory", "bench"], ROOT).splitlines()
    assert lines[-2:] == [".venv/bin/python benchmarks/peers.py", ".venv/bin/python docs/build.py"]


@pytest.mark.slow
def test_make_parity_writes_the_page(checkout):
    run(["make", "parity", "ARGS=--lengths 17 --output found.md"], checkout)
    headings = [re.findall(r"^#.*$", path.read_text(encoding="utf-8"), re.M)
                for path in (checkout / "found.md", ROOT / "benchmarks" / "parity.md")]
    assert headings[0] and set(headings[0]) <= set(headings[1])


def test_the_pretraining_pages_excerpts_are_what_the_code_does(tmp_path):
    """Its two snippets are run with parts of a small model, and compared with the model's own methods."""
    from test_pretrain import DOES, WHO, small_model, some_ids

    from minipref.pretrain import load_corpus
    first, second = fences("docs/pretraining.md", "python")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{who} {does}." for who in WHO for does in DOES) + "\n")
    corpus = load_corpus([tmp_path / "text.txt"], 0.1, None, 330)
    model = small_model(corpus)
    names = {"model": model, "input_ids": some_ids(corpus), "F": torch.nn.functional}
    exec(compile(first.text, first.page, "exec"), names)
    assert names["rtd_logits"].shape == names["input_ids"].shape and names["rtd_loss"].requires_grad
    assert names["mlm_loss"].item() > 1 and names["mlm_logits"].shape[0] == names["is_masked"].sum()
    names = {"Tensor": torch.Tensor}
    exec(compile(second.text, second.page, "exec"), names)
    for sharing in ("gdes", "es", "nes"):
        model = small_model(corpus, sharing=sharing)
        assert torch.equal(names["discriminator_table"](model), model.discriminator_table())


@pytest.mark.slow
@pytest.mark.parametrize("fence", sh_fences("needs"), ids=lambda fence: f"{fence.page}:{fence.line}")
def test_commands_that_need_the_competitions_rows_run_on_others_in_its_layout(fence, checkout):
    assert fence.mark == "needs: data/train.csv data/test.csv"
    data = checkout / "data"
    data.mkdir(exist_ok=True)
    (checkout / "submission.csv").unlink(missing_ok=True)
    rows = write_rows(data / "train.csv", 60), write_rows(data / "test.csv", 12, seed=1, labels=False)
    try:
        run_fence(fence, checkout)
        assert (checkout / "submission.csv").read_text().count("\n") == 13
    finally:
        for path in rows:
            path.unlink()


def test_the_readme_counts_the_tests_that_make_test_runs(request):
    """The number of tests is only known when all of them run. It may differ a little: README is one run's output."""
    text = text_of("README.md")
    passed, skipped = map(int, re.search(r"^(\d+) passed, (\d+) skipped in .*$", text, re.M).groups())
    assert f"{skipped} tests are skipped because they need files" in text
    options = request.config.option
    if options.markexpr == "not slow" and not options.keyword and request.config.args == ["tests"]:
        assert abs(request.session.testscollected - passed - skipped) < 50      # or README is out of date


def test_the_readmes_results_are_the_measured_ones_and_the_pages_have_them_too():
    """The table is generated from benchmarks/experiments.json; here, its gap and the pages that it is explained in."""
    rows = re.findall(r"^\| (.+?) \| (\d\.\d{4}) \| (\d+)% \| (\d\.\d{4})? ?\|$",
                      text_of("README.md").split("<!-- results -->")[1], re.M)
    (_, prior, *_), *_, (_, best, *_) = rows
    pages = "".join(text_of(page) for page in PAGES if page != "README.md")
    for what, loss, gap, real in rows:
        assert round(100 * (float(prior) - float(loss)) / (float(prior) - float(best))) == int(gap), what
        assert loss in pages and real in pages, what
    assert len(rows) == 4


@pytest.mark.slow
def test_the_readmes_figures_of_the_synthetic_dataset_are_its_own(tmp_path):
    """All output of `make train` that does not depend on training: rows, split, baselines, Bayes-optimal score."""
    import train
    text = next(fence.text for fence in fences("README.md") if fence.mark == "printed by: make train")
    path = synthetic.write_dataset(tmp_path)["train"]
    pairs = list(read_pairs(path))
    labels, lengths = np.array([pair.label for pair in pairs]), character_counts(pairs)
    assert f"It writes {len(pairs):,} synthetic rows" in text_of("README.md")
    lines = path.read_text(encoding="utf-8").splitlines()
    shown = next(fence.text for fence in fences("README.md") if fence.text.startswith("id,")).splitlines()
    assert len(shown) == 3 and set(shown) <= set(lines)

    options = train.resolve_options({"train": [str(path)], "encoder": "weights/minipref-tiny"})
    (train_rows, valid_rows), = train.split_rows(pairs, [], train.hyperparameters(options), options)
    results = metrics.baselines(lengths[train_rows], labels[train_rows], lengths[valid_rows], labels[valid_rows])
    truth = synthetic.read_truth([path])
    bayes_optimal = np.array([truth[pairs[row].id] for row in valid_rows])
    results["Bayes-optimal"] = metrics.evaluate(bayes_optimal, labels[valid_rows])
    rows = {name: figures for name, *figures in (re.split(r"\s{2,}", line.strip())
                                                 for line in metrics.score_table(results).splitlines()[1:])}
    for name in ("class prior", "length only", "Bayes-optimal"):
        found = re.search(rf"^{name}\s{{2,}}(.*)$", text, re.M)[1].split()
        assert np.allclose([float(f) for f in found], [float(f) for f in rows[name]], atol=1.1e-3), name
