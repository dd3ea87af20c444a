"""Fault tolerance: the guarantees of docs/reliability.md. For bad input see test_hostile.py and test_fuzz.py.
"""

import contextlib
import hashlib
import json
import logging
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import write_rows

import predict
import train
from minipref.data import read_pairs
from minipref.explain import __main__ as explain_program
from minipref.pretrain import __main__ as pretrain_program
from minipref.pretrain import loop as pretrain_loop
from minipref.run import folder as run_folder
from minipref.run import report, signals, state
from minipref.runtime import TEMPORARY, InputError, Stopped, atomic_write, run_program

ROOT = Path(train.__file__).resolve().parent
HELP = "(docs/troubleshooting.md)"             # of the page that explains the message
FAST = ["--recipe", "tiny", "--epochs", "2", "--lr", "3e-3", "--precision", "fp32", "--batch-size", "8",
        "--evals-per-epoch", "1", "--accumulate", "2", "--valid-fraction", "0.2", "--max-length", "32"]
OUTCOME = ("metrics.csv", "valid_predictions.csv", "model/model.safetensors", "model/minipref.json")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in its own folder with training rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.csv", 60)


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    """An uninterrupted run, with a state after each step."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        write_rows(Path("t.csv"), 60)
        assert train.main(begin(encoder)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def half(encoder, tmp_path_factory):
    """The same run, stopped after the fourth of six steps, with its previous state."""
    folder = tmp_path_factory.mktemp("half")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        write_rows(Path("t.csv"), 60)
        signal_at(patch, train, STEP, 4)
        assert train.main(begin(encoder)) == 143
    return folder / "run"


def begin(encoder, *more) -> list[str]:
    fast = FAST
    if {"--folds", "--all-rows", "--valid"} & set(more):          # each refuses --valid-fraction
        place = FAST.index("--valid-fraction")
        fast = FAST[:place] + FAST[place + 2:]
    return ["--train", "t.csv", "--encoder", str(encoder), "--run", "run", *fast, "--save-every", "0", *more]


RESUME = ["--resume", "--run", "run"]


STEP = "learning_rates"         # what train.py calls once at the beginning of each step


def signal_at(patch, module, name, number, which=signal.SIGTERM):
    """Send a signal just before the `number`-th call of a function."""
    real, calls = getattr(module, name), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), which)
        return real(*args, **kwargs)
    patch.setattr(module, name, called)


def same_ending(found: Path, wanted: Path) -> None:
    for name in OUTCOME:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    tensors, others = (state.read_state(folder / "state")[0] for folder in (found, wanted))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def call(capsys, arguments, main=train.main) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, arguments, main=train.main) -> str:
    """The one-line message of a refused command with exit code 2."""
    code, _, err = call(capsys, arguments, main)
    assert code == 2 and err.count("\n") == 1, err
    return err


# --- exact resume

@pytest.mark.parametrize(("module", "name", "number", "wanted"), [
    (train, "collate", 1, 143), (train, "collate", 2, 143), (train, "collate", 6, 143),  # within a step, too
    (train, "predict_logits", 1, 143), (train.metrics, "evaluate", 2, 143), (train, "save_state", 3, 143),
    (train, "save_best", 1, 143), (report, "write_page", 1, 0)])         # at last only the report is left to write
def test_a_signal_at_any_moment_costs_nothing(encoder, whole, monkeypatch, module, name, number, wanted):
    with monkeypatch.context() as patch:
        signal_at(patch, module, name, number)
        assert train.main(begin(encoder)) == wanted
    if wanted:
        assert train.main(RESUME) == 0
    same_ending(Path("run"), whole)


@pytest.mark.slow
def test_a_run_stopped_right_after_early_stopping_stays_stopped_and_ends_the_same(encoder, capsys, monkeypatch):
    early = begin(encoder, "--patience", "1", "--epochs", "30", "--lr", "0.1")
    assert train.main(early) == 0
    Path("run").rename("once")
    with monkeypatch.context() as patch:
        signal_at(patch, train, "final_report", 1)
        assert train.main(early) == 143
    facts = state.read_state("run/state")[1]
    assert facts["state"]["evals_since_best"] == 1
    code, out, _ = call(capsys, RESUME)
    assert code == 0 and "no better log loss" in out
    same_ending(Path("run"), Path("once"))


def test_repeated_ids_of_training_rows_are_counted_over_all_files(encoder, capsys):
    lines = Path("t.csv").read_text().splitlines(keepends=True)
    Path("more.csv").write_text("".join(lines[:11]))
    assert train.main(begin(encoder, "--train", "t.csv", "more.csv", "--epochs", "1")) == 0
    first = lines[1].split(",")[0]
    assert f"repeated ids, in all files together: 10; the first: {first}\n" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is_when_it_is_resumed(whole, capsys):
    shutil.copytree(whole, "run")
    shutil.copy(whole.parent / "t.csv", "t.csv")
    for name in ("model/README.md", "report.html", "report.json", "valid_predictions.csv", "metrics.csv", "timing.csv"):
        Path("run", name).write_text("mine")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert train.main(RESUME) == 0
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert "this run was finished before" in capsys.readouterr().out


def test_a_report_of_another_state_is_refused_before_a_step(half, whole, capsys):
    resumable(half)
    shutil.copy(whole / "report.json", "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert "run/report.json: a report, although the run has not ended" in refused(capsys, RESUME)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    Path("run/report.json").unlink()
    assert train.main(RESUME) == 0
    same_ending(Path("run"), whole)


def test_a_model_of_another_run_is_noticed_when_the_run_is_resumed(encoder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, train, STEP, 5)                       # a step after the first evaluation
        assert train.main(begin(encoder)) == 143
    facts = state.read_state("run/state")[1]["state"]
    assert 0 < facts["best_step"] < facts["step"]
    path = Path("run/model/model.safetensors")
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 1))
    _, out, _ = call(capsys, RESUME)
    assert f"note: run/model has other weights than the best evaluation so far, of step {facts['best_step']}" in out


def test_a_link_in_place_of_the_model_is_refused_and_its_target_stays(half, encoder, capsys):
    resumable(half)
    shutil.rmtree("run/model", ignore_errors=True)
    shutil.copytree(encoder, "mine")
    Path("run/model").symlink_to(Path("mine").resolve())
    before = {path: path.read_bytes() for path in Path("mine").iterdir()}
    assert "run/model: a link, whose target the run would replace" in refused(capsys, RESUME)
    assert {path: path.read_bytes() for path in Path("mine").iterdir()} == before


def test_folds_that_changed_places_are_refused(encoder, capsys):
    assert train.main(begin(encoder, "--folds", "2", "--epochs", "1")) == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert train.main(RESUME) == 0
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    Path("run/fold-1").rename("first")
    Path("run/fold-2").rename("run/fold-1")
    Path("first").rename("run/fold-2")
    assert "run/fold-1/state: the state of a run or fold with other training and validation rows" in refused(
        capsys, RESUME)


def test_two_runs_alike_are_alike_to_the_last_bit_and_deterministic_mode_is_on(encoder, whole, monkeypatch):
    modes, check_step = set(), train.check_step
    monkeypatch.setattr(train, "check_step", lambda *args: (modes.add(torch.get_deterministic_debug_mode()),
                                                            check_step(*args)))
    assert train.main(begin(encoder)) == 0
    assert modes == {2}
    same_ending(Path("run"), whole)


@pytest.mark.slow
def test_a_stopped_half_precision_run_keeps_its_loss_scale(encoder, monkeypatch):
    half_precision = [x if x != "fp32" else "fp16" for x in begin(encoder, "--lr", "1e-3")]
    assert train.main(half_precision) == 0
    Path("run").rename("once")
    with monkeypatch.context() as patch:
        signal_at(patch, train, STEP, 3)
        assert train.main(half_precision) == 143
    scaler = state.read_state("run/state")[1]["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] == 3
    assert train.main(RESUME) == 0
    same_ending(Path("run"), Path("once"))


def resumable(half: Path) -> None:
    """A copy of the stopped run in the current folder."""
    shutil.copytree(half, "run")
    shutil.copy(half.parent / "t.csv", "t.csv")


def change_manifest(change) -> None:
    """Change config.json and its checksum, as if another machine or version had written it."""
    path = Path("run/config.json")
    stored = run_folder.read_manifest(path.parent, "train.py")
    change(stored)
    run_folder.write_manifest(path.parent, stored)


@pytest.mark.parametrize(("change", "what"), [
    (lambda c: c["hyperparameters"].update(lr=1e-5),
     "lr has changed since the run began: it was 1e-05 and is 0.003"),
    (lambda c: c["hyperparameters"].pop("clip"), "clip has changed since the run began: it was None and is 1.0"),
    (lambda c: c["fingerprint"].update(minipref="9.9"), "minipref has changed since the run began: it was '9.9' and"),
    (lambda c: c["fingerprint"].update(precision="bf16"),
     "precision has changed since the run began: it was 'bf16' and is 'fp32'"),
    (lambda c: c["fingerprint"].update(train=["0" * 64]), "train has changed since the run began;"),
    (lambda c: c["fingerprint"]["encoder"].update({"model.safetensors": "0" * 64}), "encoder has changed"),
], ids=["a hyperparameter", "a hyperparameter gone", "version", "precision", "rows", "encoder"])
def test_what_a_run_was_started_with_cannot_change_under_it(half, capsys, change, what):
    resumable(half)
    change_manifest(change)
    assert what in refused(capsys, RESUME)


def test_a_run_finds_its_files_from_another_directory_and_takes_new_paths_for_the_same_content(encoder, monkeypatch,
                                                                                               capsys):
    shutil.copytree(encoder, "encoder")
    write_rows(Path("v.csv"), 12, seed=3)
    relative = begin("encoder", "--valid", "v.csv")
    assert train.main(relative) == 0
    Path("run").rename("once")

    def stopped(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            signal_at(patch, train, STEP, 2)
            assert train.main(arguments) == 143

    stopped(relative)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    write_rows(Path("t.csv"), 60, seed=8)                      # of the same name, and not what the run was begun with
    stopped(["--resume", "--run", "../run"])
    for name in ("t.csv", "v.csv", "encoder"):
        Path("..", name).rename(f"new-{name}")
    moved = ["--resume", "--run", "../run", "--valid", "new-v.csv", "--encoder", "new-encoder"]
    assert "train has changed" in refused(capsys, [*moved, "--train", "t.csv"])
    assert "valid has changed" in refused(capsys, [*moved, "--train", "new-t.csv", "--valid", "t.csv"])
    stopped([*moved, "--train", "new-t.csv"])
    monkeypatch.chdir("..")
    assert train.main(RESUME) == 0                             # the new paths were written down
    same_ending(Path("run"), Path("once"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow only names in UTF-8")
def test_a_folder_whose_name_is_not_utf8_and_an_id_with_half_a_pair_cost_nothing(encoder, tmp_path):
    place = os.fsencode(tmp_path) + b"/a\xff"
    os.mkdir(place)
    for name, labels in (("t.jsonl", {"winner": "tie"}), ("test.jsonl", {})):
        rows = ({"id": f"i{n}\ud83d", "prompt": [f"Question {n}"], "response_a": ["yes"], "response_b": ["no"]} | labels
                for n in range(24))
        Path(os.fsdecode(place), name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--train", "t.jsonl", "--encoder", str(encoder), "--run", "run", "--epochs", "1", "--max-length", "32"]
    for command in (["train.py", *arguments], ["train.py", "--resume", "--run", "run"],
                    ["predict.py", "test.jsonl", "--model", "run/model"]):
        done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=place, capture_output=True,
                              text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert Path(os.fsdecode(place), "submission.csv").read_text(encoding="utf-8").count("\ufffd,") == 24


def test_paths_of_a_moved_project_are_found_where_the_run_is_resumed(tmp_path, monkeypatch):
    stored = {"corpus": ["text.txt", "/absolute.txt"], "encoder": None, "lr": 1.0}
    for place in ("began", "elsewhere"):
        Path(place).mkdir()
        Path(place, "text.txt").touch()
    monkeypatch.chdir("began")
    run_folder.write_manifest(Path(), {"program": "it", "options": stored, "hyperparameters": {}, "fingerprint": {}})
    options = {"program": "it", "overrides": {}, "free": set(), "paths": {"corpus", "encoder"}}
    assert run_folder.resumed_options(Path(), **options) == stored
    monkeypatch.chdir("../elsewhere")
    there = str(tmp_path / "began" / "text.txt")
    assert run_folder.resumed_options(Path("../began"), **options) == stored | {"corpus": [there, "/absolute.txt"]}
    monkeypatch.chdir("..")
    Path("began").rename("moved")
    monkeypatch.chdir("moved")
    assert run_folder.resumed_options(Path(), **options) == stored


def test_another_number_of_threads_or_version_of_torch_is_accepted_with_a_note(half, capsys):
    resumable(half)
    change_manifest(lambda c: c["fingerprint"].update(threads=64, torch="1.0"))
    code, out, _ = call(capsys, RESUME)
    assert code == 0 and out.count("the run resumes, but not bit for bit") == 2
    assert f"note: threads has changed (it was 64 and is {torch.get_num_threads()})" in out
    assert "note: torch has changed (it was '1.0' and" in out


# --- the state is always loadable

def test_a_damaged_configuration_is_noticed_whatever_is_damaged(half, capsys):
    resumable(half)
    path = Path("run/config.json")
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        try:
            read = run_folder.read_manifest(path.parent, "train.py")
            assert read == {k: v for k, v in json.loads(content).items() if k != "sha256"}
        except InputError as problem:
            assert "config.json" in str(problem)
    path.write_bytes(content.replace(b'"lr": 0.003', b'"lr": 0.007'))
    assert "does not match its checksum" in refused(capsys, RESUME)
    path.write_bytes(content[:len(content) // 2])
    assert "config.json" in refused(capsys, RESUME)
    path.unlink()
    assert "config.json: no such file; expected the folder of a run" in refused(capsys, RESUME)


def damaged_states(place: Path):
    """(what, file, how) for every kind of damage to the current state."""
    pointer, = place.glob("current.json")
    tensors = place / json.loads(pointer.read_text())["tensors"]
    for file in (pointer, tensors):
        content = file.read_bytes()
        yield f"{file.name} missing", file, None
        for part in range(16):
            yield f"{file.name} cut at {part}/16", file, content[:len(content) * part // 16]
        for place in range(0, len(content), max(1, len(content) // 40)):
            yield f"{file.name} flipped at {place}", file, flipped(content, place)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1:]


def test_damage_to_a_state_is_noticed_named_and_the_one_before_it_is_offered(half, tmp_path):
    shutil.copytree(half / "state", "state")
    place = Path("state")
    wanted, facts = state.read_state(place)
    before = state.read_state(place, state.PREVIOUS)[1]["step"]
    assert before <= facts["step"] == 4
    for what, file, content in list(damaged_states(place)):
        good = file.read_bytes()
        file.unlink() if content is None else file.write_bytes(content)
        try:
            tensors, found = state.read_state(place)          # a flip in the white space of JSON is no damage
            assert found == facts and all(torch.equal(tensors[name], wanted[name]) for name in wanted), what
        except InputError as problem:
            assert "state/" in str(problem.file), what
            assert f"the state before it (step {before}) is intact" in str(problem), what
        file.write_bytes(good)


def test_following_the_advice_after_damage_ends_the_same(half, whole, capsys):
    resumable(half)
    tensors = Path("run/state", json.loads(Path("run/state/current.json").read_text())["tensors"])
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    advice = re.search(r"copy (\S+) over (\S+) to resume", refused(capsys, RESUME))
    shutil.copy(*advice.groups())
    assert train.main(RESUME) == 0
    same_ending(Path("run"), whole)


def test_a_lost_pointer_does_not_begin_the_run_anew(half, encoder, capsys):
    resumable(half)
    Path("run/state/current.json").unlink()
    assert "current.json: no such file" in refused(capsys, RESUME)
    assert "a run that can be resumed" in refused(capsys, begin(encoder))
    shutil.rmtree("run/state")
    assert "no state, although metrics.csv shows" in refused(capsys, RESUME)


def test_a_state_of_another_format_is_refused_by_its_number(half):
    shutil.copytree(half / "state", "state")
    for pointer in (Path("state/current.json"), Path("state/previous.json")):
        pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"format": 7}))
    with pytest.raises(InputError, match="a state of format 7; expected format 3"):
        state.read_state("state")


def test_a_state_of_the_first_edition_is_refused(half, capsys):
    """Its tensors and facts have other names, so no key may be looked up before the format is checked."""
    resumable(half)
    for name in ("current.json", "previous.json"):
        pointer = json.loads(Path("run/state", name).read_text())
        facts = json.dumps({"progress": {"step": 4}, "random": {}, "scaler": {}, "step": 4, "lr": 1e-3})
        pointer |= {"format": 1, "facts": facts, "facts_sha256": hashlib.sha256(facts.encode()).hexdigest()}
        Path("run/state", name).write_text(json.dumps(pointer))
    assert "a state of format 1; expected format 3" in refused(capsys, RESUME)
    stored = run_folder.read_manifest(Path("run"), "train.py")
    run_folder.write_manifest(Path("run"), {"options": {"train": ["t.csv"], "seed": 42}, "figures": {},
                                            "identity": stored["fingerprint"]})
    assert "a run of another version of minipref" in refused(capsys, RESUME)


def test_other_weights_in_the_models_folder_are_noticed_at_the_end(encoder, capsys):
    assert train.main(begin(encoder, "--patience", "1", "--epochs", "30", "--lr", "0.1")) == 0
    path = Path("run/model/model.safetensors")
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 1))
    facts = state.read_state("run/state")[1]["state"]
    assert facts["best_step"] < facts["step"], "were the last evaluation the best, the state would mend the file"
    assert "other weights than the best evaluation's" in refused(capsys, RESUME)


def test_what_killed_processes_left_half_written_is_removed(half, whole):
    resumable(half)
    for place in ("", "state", "model"):
        Path("run", place, f"{TEMPORARY}AbC12345").mkdir(parents=True)
        Path("run", place, f"{TEMPORARY}AbC12345", "model.safetensors").write_bytes(b"half")
    assert train.main(RESUME) == 0
    assert not list(Path("run").rglob(".*"))
    same_ending(Path("run"), whole)


@pytest.mark.slow
def test_a_hundred_kills_and_more_change_nothing():
    done = subprocess.run([sys.executable, ROOT / "tests" / "killing.py", "--small"], text=True, capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 100 and "every one ended with the same bytes" in done.stdout


# --- a full disk

@pytest.mark.parametrize("save", [1, 2, 4])
def test_a_full_disk_ends_in_one_line_with_the_last_state_whole(encoder, whole, small_disk, capsys, monkeypatch, save):
    monkeypatch.chdir(small_disk("24m"))                                 # a run of these tests takes 8
    shutil.copy(whole.parent / "t.csv", "t.csv")
    real, saves = state.write_state, []

    def save_on_a_full_disk(*args):
        saves.append(1)
        if len(saves) == save:
            fill(Path("filler"))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_state", save_on_a_full_disk)
        code, _, err = call(capsys, begin(encoder))
    assert code == 1 and err.count("\n") == 1 and "No space left on device" in err and "Traceback" not in err
    assert state.has_state("run/state") == (save > 1) == ("to resume: python train.py --resume --run 'run'" in err)
    Path("filler").unlink()
    assert train.main(RESUME) == 0
    same_ending(Path("run"), whole)


def test_a_run_resumes_on_a_disk_that_holds_it_already(half, whole, capsys, monkeypatch):
    resumable(half)
    held = sum(file.stat().st_size for file in Path("run").glob("*/*.safetensors"))
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    assert "free on its disk" in refused(capsys, RESUME)
    free[0] = held                               # two states and model/ are there: there is one more to write
    assert train.main(RESUME) == 0
    same_ending(Path("run"), whole)


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
                                     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")])
def test_out_of_memory_is_one_line_with_advice(encoder, whole, capsys, monkeypatch, problem):
    def fail(*_, **__):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(train, STEP, fail)
        code, _, err = call(capsys, begin(encoder))
        assert code == 1 and err.count("\n") == 1 and "out of memory" in err and "--accumulate" in err and HELP in err
        patch.setattr(predict, "predict_rows", fail)
        assert predict.main(["t.csv", "--model", str(whole / "model")]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "out of memory" in err and "--batch-tokens" in err and HELP in err
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="something else"):
        problem = RuntimeError("something else")
        patch.setattr(train, STEP, fail)
        train.main(begin(encoder, "--run", "other"))


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


LIMITED = """
    import resource, signal, sys
    sys.path.insert(0, {root!r})
    import train
    from minipref.run import state
    real, saves = state.write_state, []
    def save(*args):
        saves.append(1)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        real(*args)
    state.write_state = save
    sys.exit(train.main({arguments!r}))
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_in_one_line_with_the_last_state_whole(encoder, whole):
    code = textwrap.dedent(LIMITED.format(root=str(ROOT), arguments=begin(encoder)))
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and "to resume: python train.py --resume --run" in done.stderr
    assert state.read_state("run/state")[1]["step"] == 2
    assert not list(Path("run/state").glob(".*"))


# --- signals

def test_a_second_signal_ends_the_process_at_once():
    code = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import train
        with train.StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("and here", flush=True)"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "still here\n", "")


def test_a_signal_that_comes_while_processes_compare_theirs_is_not_lost(monkeypatch):
    def interrupted(number):
        if not came:
            came.append(os.kill(os.getpid(), signal.SIGTERM))
        return number

    came = []
    monkeypatch.setattr(train.distributed, "all_reduce_max", interrupted)
    with train.StopSignal() as stop:
        stop.check()
        with pytest.raises(Stopped):
            stop.check()
    assert stop.number == signal.SIGTERM


@pytest.fixture
def hang_up_ends_a_program():
    """SIGHUP has its default action, as in a terminal, also if these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up_ends_a_program")
@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 128 + signal.SIGUSR1),
    (signal.SIGUSR2, 128 + signal.SIGUSR2), (signal.SIGXCPU, 128 + signal.SIGXCPU)])
def test_each_signal_has_its_exit_code_and_the_command_to_resume(encoder, monkeypatch, capsys, number, code):
    with monkeypatch.context() as patch:
        signal_at(patch, train, STEP, 2, number)
        found, out, err = call(capsys, begin(encoder))
    assert found == code and not err and "to resume: python train.py --resume --run 'run'" in out
    assert state.read_state("run/state")[1]["step"] == 2      # the step that was begun is finished


@pytest.mark.parametrize("number", set(signals.SIGNALS) - {signal.SIGINT})
def test_a_signal_that_is_ignored_stays_ignored(number):
    """For example SIGHUP under nohup. SIGINT is an exception: scripts ignore it for background jobs."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with train.StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.number == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures("hang_up_ends_a_program")
def test_a_closed_terminal_costs_nothing_though_each_print_fails(encoder, monkeypatch):
    """The terminal is closed when SIGHUP arrives, from the system and again from the shell."""
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        def hang_up(*args):
            if not closed:
                closed.append(os.close(ours))
                with pytest.raises(OSError):
                    os.write(theirs, b"a line")
                for number in (signal.SIGHUP, signal.SIGHUP):
                    os.kill(os.getpid(), number)
                print("a line of the log", flush=True)
            return real(*args)

        closed, real = [], train.learning_rates
        patch.setattr(train, STEP, hang_up)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        assert train.main(begin(encoder)) == 129
    assert state.read_state("run/state")[1]["step"] == 1


def test_a_log_whose_reader_got_the_signal_too_is_no_error(encoder, monkeypatch):
    """As in `train.py | tee log`. Python flushes the stream again at exit, which must not fail either."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        for problem, code in ((Stopped(signal.SIGTERM), 143), (InputError(found="this"), 2)):
            def body(problem=problem):
                raise problem
            assert run_program("train.py", body) == code
        pipe.flush()


def test_a_run_outside_the_main_thread_says_that_no_signal_is_handled(encoder, capsys):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(train.main(begin(encoder, "--all-rows", "--epochs", "1"))))
    thread.start()
    thread.join()
    out = capsys.readouterr().out
    assert ended == [0] and out.count("note: signals are not handled outside the main thread") == 1


def process_globals() -> dict:
    """The global settings of the process."""
    backends = torch.backends
    return {
        "deterministic": (torch.get_deterministic_debug_mode(), torch.are_deterministic_algorithms_enabled(),
                          torch.utils.deterministic.fill_uninitialized_memory),
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "matmul": (torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32,
                   backends.cudnn.allow_tf32, backends.mkldnn.enabled),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.is_autocast_enabled("cpu"), torch.get_default_device()),
        "generators": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "numpy": (np.geterr(), np.get_printoptions()),
        "environment": dict(os.environ) | {"PYTEST_CURRENT_TEST": ""},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": list(warnings.filters), "folder": os.getcwd(), "umask": umask(),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers), logging.root.manager.disable),
        "streams": (sys.stdout, sys.stderr, sys.stdout.errors, sys.stderr.errors, sys.excepthook),
    }


def umask() -> int:
    os.umask(before := os.umask(0))
    return before


def test_what_a_command_may_change_for_its_process_is_put_back():
    before = process_globals()
    with contextlib.suppress(KeyboardInterrupt), state.keep_globals():
        state.make_deterministic(torch.device("cpu"))
        state.seed_everything(before["torch"][1])
        torch.set_num_threads(before["torch"][1] + 1)
        assert all(process_globals()[name] != before[name] for name in ("deterministic", "generators", "torch"))
        raise KeyboardInterrupt
    assert process_globals() == before


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["all well", "an error"])
def test_what_is_global_is_as_it_was_after_every_command_and_every_error(encoder, whole, monkeypatch, error):
    def broken_off(*_, **__):
        raise error

    model = str(whole / "model")
    words = Path("text.txt")
    words.write_text("\n".join(f"the old cook reads {n} letters" for n in range(60)))
    programs = [
        (train.main, begin(encoder), (train, "save_best")),
        (predict.main, ["t.csv", "--model", model], (predict, "predict_rows")),
        (explain_program.main, ["t.csv", "--model", model], (explain_program, "explain")),
        (pretrain_program.main, ["--corpus", str(words), "--output", "pretrained", "--tokenizer", str(encoder),
                                 "--width", "32", "--heads", "2", "--layers", "2", "--feed-forward", "64", "--length",
                                 "24", "--long-length", "24", "--batch-tokens", "96", "--steps", "2", "--warmup", "1",
                                 "--evaluations", "1", "--heldout-share", "0.2", "--threads", "3"],
         (pretrain_loop, "evaluate")),
    ]
    with open("out.txt", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        for main, arguments, place in programs:
            torch.manual_seed(1)
            before = process_globals()
            with monkeypatch.context() as patch:
                if error:
                    patch.setattr(*place, broken_off)
                assert main(arguments) == (130 if error else 0), arguments
            after = process_globals()
            assert [name for name in before if before[name] != after[name]] == [], arguments
        monkeypatch.undo()


class NoCompiler(RuntimeError):
    """Like torch's error, without the slow import of its class."""

    __module__ = "torch._inductor.exc"


COMPILER_ERRORS = [
    NoCompiler("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\n"
               "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"),
    NoCompiler("CppCompileError: C++ compile error\n\nCommand:\ng++ main.cpp\n\nOutput:\nfatal error: Python.h"),
    RuntimeError("torch.compile is not supported on Python 3.99+"),
]


@pytest.mark.parametrize("where", ["when it is asked for", "in the first forward pass"])
@pytest.mark.parametrize("problem", COMPILER_ERRORS, ids=["none", "broken", "too new a Python"])
def test_without_a_compiler_compile_is_one_line(encoder, monkeypatch, capsys, problem, where):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(torch, "compile", fail if where.startswith("when") else lambda *_, **__: fail)
    code, _, err = call(capsys, begin(encoder, "--compile"))
    assert code == 1 and err.count("\n") == 1 and "--compile needs a C++ compiler" in err and HELP in err
    assert str(problem).splitlines()[0] in err and "TORCHDYNAMO" not in err and "Command" not in err


@pytest.mark.slow
def test_without_a_compiler_compile_is_one_line_of_torchs_own_error(encoder):
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    done = subprocess.run([sys.executable, ROOT / "train.py", *begin(encoder, "--compile")], env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No working C++ compiler" in done.stderr


def test_save_every_bounds_what_sudden_death_costs(encoder, monkeypatch):
    clock, saved, check_step = [0.0], [], train.check_step

    def a_step_of_a_minute(*args):
        clock[0] += 60
        check_step(*args)

    def save_state(folder, state, *rest):
        saved.append(state.step)

    monkeypatch.setattr(train, "check_step", a_step_of_a_minute)
    monkeypatch.setattr(train, "save_state", save_state)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    assert train.main(begin(encoder, "--epochs", "4", "--all-rows", "--save-every", "3")) == 0
    assert saved == [3, 4, 7, 8, 11, 12, 15, 16]              # every third minute, and after each epoch


# --- numbers

def poison(monkeypatch, step: int, value: float, where: str) -> None:
    """Make the loss or a gradient of one step NaN or infinite."""
    real, calls = train.clip_gradients, []

    def clip(parameters, most):
        calls.append(1)
        parameters = list(parameters)
        if len(calls) == step and where == "gradient":
            parameters[3].grad.view(-1)[0] = value
        return real(parameters, most)

    losses, real_loss = [], train.F.cross_entropy

    def cross_entropy(*args, **kwargs):
        losses.append(1)
        of_the_step = 4 * step - 1               # a step has two micro-batches, each with the losses of two heads
        return real_loss(*args, **kwargs) * (value if len(losses) == of_the_step and where == "loss" else 1)

    monkeypatch.setattr(train, "clip_gradients", clip)
    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize(("where", "value"), [("gradient", np.inf), ("gradient", np.nan), ("loss", np.nan)])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_before_it_does_harm(encoder, monkeypatch, capsys, where,
                                                                                value):
    poison(monkeypatch, 3, value, where)
    code, _, err = call(capsys, begin(encoder))
    assert code == 1 and err.count("\n") == 1 and "step 3: loss" in err and "--lr" in err
    named = re.search("rows ([0-9, ]+)", err)[1].split(", ")
    assert len(named) in (15, 16) and set(named) <= {pair.id for pair in read_pairs("t.csv")}
    tensors, facts = state.read_state("run/state")
    assert facts["step"] == 2 and all(torch.isfinite(t).all() for t in tensors.values())


def test_half_precision_steps_that_overflow_are_left_out_and_counted(encoder, monkeypatch, capsys):
    poison(monkeypatch, 3, np.inf, "loss")
    half_precision = [x if x != "fp32" else "fp16" for x in begin(encoder)]
    assert train.main(half_precision) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert report["skipped_steps"] == 1 and report["steps"] == 6
    assert Path("run/metrics.csv").read_text().splitlines()[-1].split(",")[-2] == "1"


def test_a_row_of_overflows_ends_with_advice(encoder, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAX_SKIPPED", 2)
    monkeypatch.setattr(train, "clip_gradients", lambda *_: float("inf"))
    monkeypatch.setattr(torch.amp.GradScaler, "step", lambda *_: None)
    code, _, err = call(capsys, [x if x != "fp32" else "fp16" for x in begin(encoder)])
    assert code == 1 and "step 3: loss" in err and f"--precision bf16 or fp32 usually helps {HELP}" in err


def test_weights_that_overflow_just_before_an_evaluation_are_named_and_not_a_traceback(encoder, capsys, monkeypatch):
    code, _, err = call(capsys, begin(encoder, "--lr", "1e30", "--evals-per-epoch", "3", "--warmup", "0"))
    assert code == 1 and err.count("\n") == 1 and "logits that are not finite for" in err and "--lr" in err
    # With no rows to validate on, nothing but a look at the weights stands between the last step and model/.
    monkeypatch.setattr(train.AdamW, "_update", lambda self, p, group: p.fill_(np.inf))
    shutil.rmtree("run")
    code, _, err = call(capsys, begin(encoder, "--epochs", "1", "--all-rows", "--batch-size", "60"))
    assert code == 1 and "weights that are not finite" in err and not Path("run/model").exists()


def test_a_run_that_learnt_only_the_prior_says_so(encoder, capsys):
    code, out, _ = call(capsys, begin(encoder, "--lr", "1e-9"))
    assert code == 0 and "CONSTANT PREDICTIONS" in out


# --- where it runs

NO_NETWORK = """
import socket
def refused(*args, **kwargs):
    with open({marker!r}, "a") as file:
        file.write("tried\\n")
    raise OSError("there is no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
"""


def without_network(folder: Path) -> dict[str, str]:
    """An environment in which every connection attempt fails and is recorded."""
    (folder / "sitecustomize.py").write_text(NO_NETWORK.format(marker=str(folder / "tried")))
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_prediction_needs_no_network_and_writes_nothing_but_its_output(encoder, whole, tmp_path):
    project, model, here = tmp_path / "project", tmp_path / "model", tmp_path / "here"
    shutil.copytree(ROOT / "minipref", project / "minipref", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "predict.py", project)
    shutil.copytree(whole / "model", model)
    here.mkdir()
    test = write_rows(tmp_path / "test.csv", 5, labels=False)
    for path in (*project.rglob("*"), *model.rglob("*"), test, project, model):
        path.chmod(path.stat().st_mode & ~0o222)
    prefix = []
    if os.geteuid() == 0:                        # root may write anywhere, unless that power is given up
        if not shutil.which("setpriv"):
            pytest.skip("read-only folders: root, and no setpriv to give up its power with")
        prefix = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override", "--"]
    command = [*prefix, sys.executable, str(project / "predict.py"), str(test), "--model", str(model)]
    done = subprocess.run(command, cwd=here, env=without_network(tmp_path), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in here.iterdir()] == ["submission.csv"] and not (tmp_path / "tried").exists()
    assert not list(project.rglob("__pycache__"))
    done = subprocess.run([*command, "--output", str(model / "out.csv")], cwd=here, env=without_network(tmp_path),
                          text=True, capture_output=True)
    assert done.returncode == 2 and "cannot be written: Permission denied" in done.stderr, "the folders were read-only"
    assert "rows" not in done.stdout             # refused before the first row was predicted


@pytest.mark.slow
def test_two_runs_at_once_do_not_disturb_each_other(encoder, whole, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *begin(encoder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    processes = [subprocess.Popen([*command, "--run", name], env=environment, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True) for name in ("one", "two")]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name in ("one", "two"):
        same_ending(Path(name), whole)
    assert Path("runs/latest").read_text().strip() in {str(Path(name).resolve()) for name in ("one", "two")}


def test_a_second_process_in_the_same_runs_folder_is_refused(half, whole, capsys):
    resumable(half)
    with run_folder.lock_run("run", "train.py", resume=True):
        assert "run: in use by another process" in refused(capsys, RESUME)
    assert train.main(RESUME) == 0
    same_ending(Path("run"), whole)


def test_a_process_that_is_refused_leaves_the_folder_to_the_one_that_has_it():
    with run_folder.lock_run("run", "it"):
        for _ in range(2):                       # the second one, too: the folder that is locked is still the folder
            with pytest.raises(InputError, match="in use by another process"), run_folder.lock_run("run", "it"):
                raise AssertionError("two at once")
            assert Path("run").is_dir()
    assert not Path("run").exists()


def test_a_run_that_comes_to_nothing_leaves_no_folder(encoder, capsys):
    refused(capsys, ["--train", "none.csv", "--encoder", str(encoder), "--run", "run"])
    assert {p.name for p in Path.cwd().iterdir()} == {"t.csv"}


@pytest.mark.slow
def test_paths_with_spaces_and_other_scripts_work_on_a_terminal_without_them(encoder, whole, tmp_path):
    folder = tmp_path / "mit Leerzeichen, 模型 é"
    shutil.copytree(encoder, folder / "der Encoder ß")
    write_rows(folder / "die Zeilen 行.csv", 60)
    arguments = begin(folder / "der Encoder ß")
    arguments[1], arguments[5] = "die Zeilen 行.csv", "ein Lauf 走"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    predicting = ["die Zeilen 行.csv", "--output", "Ergebnis 結果.csv"]
    for program, more in (("train.py", arguments), ("predict.py", predicting)):
        done = subprocess.run([sys.executable, ROOT / program, *more], cwd=folder, env=environment, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
    same_ending(folder / "ein Lauf 走", whole)
    assert (folder / "Ergebnis 結果.csv").read_text().count("\n") == 61


def test_a_run_does_not_fail_because_runs_latest_cannot_be_written(encoder, whole, capsys):
    Path("runs").write_text("a file where the folder should be")
    code, out, _ = call(capsys, begin(encoder))
    assert code == 0 and "note: runs/latest cannot be written" in out
    same_ending(Path("run"), whole)


def test_a_submission_that_could_not_be_written_is_refused_before_the_first_row_is_predicted(whole, capsys):
    Path("folder").mkdir()
    for output in ("folder", "t.csv/below-a-file.csv"):
        code, out, err = call(capsys, ["t.csv", "--model", str(whole / "model"), "--output", output], predict.main)
        assert code == 2 and "cannot be written" in err and err.count("\n") == 1 and not out


# --- files

def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and set(tmp_path.iterdir()) == before


# --- the page

def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {name for file in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)}
    assert len(named) > 40 and not named - there
