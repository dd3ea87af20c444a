"""The programs never overwrite other files: run folders, outputs that are links or pipes, sibling files."""

import contextlib
import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small import BUNDLED, write_rows

import minipref
import predict
import train
from minipref import synthetic
from minipref.explain import __main__ as explain_program
from minipref.pretrain import __main__ as pretrain_program
from minipref.pretrain import loop
from minipref.run.folder import RESULTS, lock_run, write_latest, write_manifest
from minipref.run.state import write_state
from minipref.runtime import InputError, atomic_write, check_writable, remove_stale_temporaries, write_text
from minipref.synthetic import __main__ as synthetic_program
from minipref.synthetic import read_truth

PAIR = ["--prompt", "p", "--a", "x", "--b", "y"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(encoder, tmp_path_factory) -> Path:
    """A trained model's folder."""
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        assert train.main(["--train", str(write_rows(Path("t.csv"), 20)), "--encoder", str(encoder), "--run", "run",
                           "--recipe", "tiny", "--epochs", "1", "--max-length", "32", "--precision", "fp32"]) == 0
        return Path("run/model").resolve()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, including links and pipes."""
    return {str(path): path.read_bytes() if path.is_file() else str(path.lstat().st_mode).encode()
            for path in sorted(folder.rglob("*"))}


def refused(capsys, main, arguments: list[str], *said: str) -> None:
    """Exit code 2, a one-line message, and all files unchanged."""
    before = content(Path())
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(text in err for text in said), err
    assert content(Path()) == before


# --- a run's folder

def manifest(program: str) -> dict:
    return {"program": program, "options": {}, "hyperparameters": {}, "fingerprint": {}}


def a_run(place: Path, program: str = "it") -> None:
    write_manifest(place, manifest(program))


FOREIGN = {
    "an encoder": lambda place: shutil.copytree(BUNDLED, place, dirs_exist_ok=True),
    "somebody's file": lambda place: write_text(place / "notes.txt", "mine"),
    "somebody's folder": lambda place: (place / "state").mkdir(parents=True),
    "a hidden file": lambda place: write_text(place / ".env", "mine"),
    "what looks temporary": lambda place: write_text(place / ".config.json.77.tmp", "mine"),
    "a config.json of something else": lambda place: write_text(place / "config.json", '{"options": 1}'),
    "a config.json that is no JSON": lambda place: write_text(place / "config.json", "options"),
    "a fold of a run": lambda place: [a_run(place.parent), write_text(place / "metrics.csv", "")],
    "runs": lambda place: [a_run(place / "first"), a_run(place / "second")],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_no_runs_is_refused_by_name_and_left_as_it_was(encoder, capsys, kind):
    FOREIGN[kind](Path("place/fold-1"))
    refused(capsys, train.main, ["--train", "none.csv", "--encoder", str(encoder), "--run", "place/fold-1"],
            "place/fold-1: a folder that contains", "not a run's")
    refused(capsys, pretrain_program.main, ["--corpus", "none", "--output", "place/fold-1"], "place/fold-1: a folder")


def test_a_new_or_empty_folder_and_that_of_a_run_are_taken():
    for prepare in (lambda place: None, Path.mkdir, a_run):
        prepare(Path("run"))
        with lock_run("run", "it"):
            pass
        shutil.rmtree("run", ignore_errors=True)


def test_a_run_killed_at_its_first_write_is_begun_again():
    """A process killed inside a write leaves only our temporary folder."""
    with atomic_write("run/config.json") as temporary:
        temporary.write_text("half")
        temporary.with_name(".tmpAbC123").write_text("safetensors' own")
        shutil.copytree("run", "killed")
    assert len(list(Path("killed").iterdir())) == 1
    with lock_run("killed", "it"):
        assert not list(Path("killed").iterdir())


def test_an_encoder_in_the_runs_own_folder_is_refused_and_stays(encoder, capsys):
    a_run(Path("run"))
    shutil.copytree(encoder, "run/model")
    write_rows(Path("t.csv"), 20)
    refused(capsys, train.main, ["--train", "t.csv", "--encoder", "run/model", "--run", "run"],
            "run/model: an encoder in")
    refused(capsys, pretrain_program.main, ["--corpus", "none", "--output", "run", "--encoder", "./run/../run/model"],
            "model: an encoder in")


def test_a_saved_state_removes_no_file_but_its_own(tmp_path):
    for number in range(4):
        write_state("state", {"x": torch.zeros(number + 1)}, {})
        Path("state/tensors-backup.safetensors").write_text("mine")
    assert Path("state/tensors-backup.safetensors").read_text() == "mine"
    assert sorted(path.name for path in Path("state").glob("tensors-?.safetensors")) == [
        "tensors-0.safetensors", "tensors-2.safetensors"]


def test_temporary_files_that_only_look_like_ours_stay():
    a_run(Path("run"))
    write_text(Path("run/.minipref-tmp-notes/mine"), "mine")
    for name in (".notes.tmp", ".tmpmine", ".config.json.77.tmp", ".minipref-tmp-mine"):
        Path("run", name).write_text("mine")
    before = content(Path("run"))
    with lock_run("run", "it"):
        pass
    remove_stale_temporaries("run")
    assert content(Path("run")) == before


# --- other folders

def test_rows_of_somebody_else_are_not_replaced_by_the_synthetic_dataset(capsys):
    small = ["--rows", "8", "--test-rows", "4"]
    for name in ("train.csv", "test.csv", "truth.csv"):
        Path("data").mkdir()
        Path("data", name).write_text("mine")
        refused(capsys, synthetic_program.main, ["--folder", "data", *small], f"data/{name}", "other rows")
        shutil.rmtree("data")
    for _ in range(2):                                    # the same rows again are no change
        synthetic.write_dataset("data", train_rows=8, test_rows=4)
    refused(capsys, synthetic_program.main, ["--folder", "data", *small, "--seed", "7"], "data/train.csv", "other rows")


def test_a_figure_that_nobody_named_is_not_written_over(model, capsys):
    arguments = [*PAIR, "--model", str(model), "--output", "page.html"]
    Path("page.svg").write_text("<svg>mine</svg>")
    refused(capsys, explain_program.main, arguments, "page.svg: a file that is not")
    Path("page.svg").unlink()
    assert explain_program.main(arguments) == explain_program.main(arguments) == 0


# --- outputs that are no regular files

@contextlib.contextmanager
def reading(path: str | int):
    """A list that after the block contains the data written into a pipe or a terminal."""
    found = []

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            while b"END" not in b"".join(found) and (part := file.read(1 << 16)):
                found.append(part)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield found
    thread.join(30)
    assert not thread.is_alive()


def test_a_pipe_and_a_device_are_written_into_and_stay_what_they_are():
    os.mkfifo("pipe")
    master, slave = os.openpty()
    for path, source in (("pipe", "pipe"), (os.ttyname(slave), os.dup(master))):
        before = os.stat(path)
        with reading(source) as found:
            check_writable(path)
            write_text(path, "written END")
        assert b"".join(found) == b"written END" and os.path.samestat(os.stat(path), before)
    os.close(slave)
    os.close(master)
    assert {path.name for path in Path().iterdir()} == {"pipe"}


@pytest.mark.parametrize("target", ["there.txt", "folder/there.txt", "missing.txt"])
def test_a_link_stays_and_its_target_is_written(target):
    Path("folder").mkdir()
    if "missing" not in target:
        Path(target).write_text("old")
    Path("link").symlink_to("second")
    Path("second").symlink_to(target)
    check_writable("link")
    write_text("link", "new")
    assert Path("link").is_symlink() and Path("second").is_symlink() and Path(target).read_text() == "new"
    assert not Path(target).is_symlink()


def test_what_cannot_be_written_is_one_line_and_stays():
    import socket
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(Path.cwd()):
        listening.bind("socket")
        Path("loop").symlink_to("loop")
        Path("folder").mkdir()
        Path("to-folder").symlink_to("folder")
        before = content(Path())
        for name in ("socket", "loop", "folder", "to-folder", "loop/file"):
            with pytest.raises(InputError, match="cannot be written"):
                check_writable(name)
            with pytest.raises(OSError), atomic_write(name):
                raise AssertionError("nothing may be written")
        assert content(Path()) == before


def test_stdout_is_written_where_it_is_and_holds_nothing_but_the_submission(model, capfd):
    write_rows(Path("test.csv"), 3, labels=False)
    for name in ("/dev/stdout", "/dev/fd/1"):
        assert predict.main(["test.csv", "--model", str(model), "--output", name]) == 0
        out, err = capfd.readouterr()
        assert out.startswith("id,winner_model_a") and out.count("\n") == 4 and "model " in err


def test_a_submission_goes_through_a_pipe_and_a_link(model):
    write_rows(Path("test.csv"), 3, labels=False)
    assert predict.main(["test.csv", "--model", str(model), "--output", "wanted.csv"]) == 0
    os.mkfifo("pipe")
    Path("link.csv").symlink_to("found.csv")
    with reading("pipe") as found:
        assert predict.main(["test.csv", "--model", str(model), "--output", "pipe"]) == 0
    assert b"".join(found) == Path("wanted.csv").read_bytes() and stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert predict.main(["test.csv", "--model", str(model), "--output", "link.csv"]) == 0
    assert Path("link.csv").is_symlink() and Path("found.csv").read_bytes() == Path("wanted.csv").read_bytes()


@pytest.mark.parametrize("name", ["test.csv", "./folder/../test.csv", "link.csv", "hard.csv", "far.csv"])
def test_an_output_that_is_an_input_is_refused_by_whatever_name(capsys, name):
    Path("folder").mkdir()
    write_rows(Path("test.csv"), 3, labels=False)
    Path("link.csv").symlink_to("test.csv")
    Path("far.csv").symlink_to("link.csv")
    os.link("test.csv", "hard.csv")
    refused(capsys, predict.main, ["test.csv", "--model", "folder", "--output", name], "same file as the input test")
    Path("page.html").symlink_to(name)
    refused(capsys, explain_program.main, ["test.csv", "--model", "folder", "--output", "page.html"], "same file")


def test_an_output_that_is_a_file_of_the_model_is_refused(encoder, capsys):
    shutil.copytree(encoder, "model")
    write_rows(Path("test.csv"), 3, labels=False)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        refused(capsys, predict.main, ["test.csv", "--model", "model", "--output", f"model/{name}"], "same file", name)


# --- siblings

def dataset() -> tuple[Path, list[str]]:
    path = synthetic.write_dataset("data", train_rows=30, test_rows=5)["train"]
    return path, [line.split(",")[0] for line in path.read_text().splitlines()[1:] if line[:1].isdigit()]


def test_the_synthetic_datasets_own_truth_is_read():
    path, ids = dataset()
    rows, _ = synthetic.train_and_test(train_rows=30, test_rows=5)
    truth = read_truth([path])
    assert len(truth) == 35 and np.allclose([truth[id] for id in rows.frame["id"]], rows.probabilities, atol=1e-9)
    assert set(ids) <= truth.keys()


HEADER = "id,p_a,p_b,p_tie\n"
FOREIGN_TRUTH = {
    "other columns": "id,label\n1,0\n", "an empty file": "", "a header": HEADER[:-1], "no UTF-8": b"\xff\xfe\x00",
    "no table": "<html>", "one-hot": f"{HEADER}1,1,0,0\n", "half and half": f"{HEADER}1,.5,.5,0\n",
    "a model's": f"{HEADER}1,0.2,0.3,0.5\n", "a model's beside the rule's": f"{HEADER}1,.2,.2,.6\n2,0.2,0.3,0.5\n",
    "words": f"{HEADER}1,a,b,c\n", "a cell too few": f"{HEADER}1,.2,.2\n", "too many": f"{HEADER}1,.2,.2,.6,1,1\n",
    "NaN": f"{HEADER}1,nan,nan,nan\n", "infinity": f"{HEADER}1,inf,.2,.6\n", "a quote": f'{HEADER}1,"\n',
    "bytes in a cell": HEADER.encode() + b"\xff,.2,.2,.6\n", "a huge number": f"{HEADER}1,{'9' * 400},.2,.6\n",
}


@pytest.mark.parametrize("kind", FOREIGN_TRUTH)
def test_a_truth_that_is_not_the_synthetic_datasets_is_not_read(kind):
    text = FOREIGN_TRUTH[kind]
    Path("truth.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    assert read_truth(["train.csv", "./train.csv"]) == {}


def test_a_truth_that_is_no_file_is_not_waited_for():
    os.mkfifo("truth.csv")
    Path("folder/truth.csv").mkdir(parents=True)
    assert read_truth(["train.csv", "folder/train.csv", "nowhere/train.csv"]) == {}


def test_a_run_beside_a_foreign_truth_reports_no_bayes_optimal_score(encoder, capsys):
    write_rows(Path("train.csv"), 20)
    Path("truth.csv").write_text("id,label\n1,0\n")
    assert train.main(["--train", "train.csv", "--encoder", str(encoder), "--run", "run", "--recipe", "tiny",
                       "--epochs", "1", "--max-length", "32", "--precision", "fp32"]) == 0
    assert "Bayes" not in capsys.readouterr().out


# --- existing files

@pytest.mark.parametrize("name", ["notes.txt", "run/config.json", "run/state/current.json", "run/valid_predictions.csv",
                                  "t.csv", "labels.csv", "notes.md"])
def test_a_file_that_is_no_submission_is_not_written_over(model, capsys, name):
    shutil.copytree(model.parent, "run")
    write_rows(Path("t.csv"), 5)
    Path("notes.txt").write_text("mine")
    header = "id,winner_model_a,winner_model_b,winner_tie"
    Path("labels.csv").write_text(f"question_{header}\n{header},comment\n")
    Path("notes.md").write_text(f"Kaggle wants {header}\n")
    write_rows(Path("test.csv"), 3, labels=False)
    refused(capsys, predict.main, ["test.csv", "--model", "run/model", "--output", name], f"{name}: a file that is not")


@pytest.mark.parametrize("rows", ["100,1,0,0\n101,0,1,0\n", "100,0.2,0.3,0.5\n# my notes\n", "100,0.2,0.3,0.6\n"])
def test_labels_and_notes_under_a_submissions_header_are_not_written_over(model, capsys, rows):
    Path("mine.csv").write_text(f"id,winner_model_a,winner_model_b,winner_tie\n{rows}")
    write_rows(Path("test.csv"), 3, labels=False)
    refused(capsys, predict.main, ["test.csv", "--model", str(model), "--output", "mine.csv"],
            "mine.csv: a file that is not a submission")


def test_a_submission_and_an_empty_file_are_replaced(model):
    write_rows(Path("test.csv"), 3, labels=False)
    Path("submission.csv").touch()
    for _ in range(3):
        assert predict.main(["test.csv", "--model", str(model)]) == 0
        spreadsheets = "\ufeff" + Path("submission.csv").read_text().replace("\n", "\r\n")
        Path("submission.csv").write_bytes(spreadsheets.encode())
    assert predict.main(["test.csv", "--model", str(model)]) == 0
    assert Path("submission.csv").read_text().count("\n") == 4


def test_a_page_of_somebody_else_is_not_written_over_and_ones_own_is(model, capsys):
    Path("mine.html").write_text("<title>mine</title>")
    refused(capsys, explain_program.main, [*PAIR, "--model", str(model), "--output", "mine.html"], "mine.html: a file")
    for _ in range(2):
        assert explain_program.main([*PAIR, "--model", str(model), "--output", "ours.html"]) == 0


def test_an_output_for_one_pair_is_refused(model, capsys):
    refused(capsys, predict.main, [*PAIR, "--model", str(model), "--output", "one.csv"], "--output without a CSV")


@pytest.mark.parametrize("kept", RESULTS)
def test_results_whose_state_is_gone_are_not_replaced(encoder, capsys, kept):
    write_rows(Path("t.csv"), 20)
    for place in (Path("run"), Path("folds/fold-1")):
        a_run(Path(place.parts[0]), "train.py")
        write_text(place / kept / "README.md" if kept == "model" else place / kept, "mine")
        refused(capsys, train.main, ["--train", "t.csv", "--encoder", str(encoder), "--run", place.parts[0]],
                f"{place.parts[0]}: a run's {Path(*place.parts[1:], kept)} without its state")
    a_run(Path("pretrained"), loop.PROGRAM)
    write_text(Path("pretrained", kept), "mine")
    refused(capsys, pretrain_program.main, ["--corpus", "none", "--output", "pretrained"],
            f"pretrained: a run's {kept}")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_of_another_program_is_refused_by_its_name(model, encoder, capsys, resume):
    shutil.copytree(model.parent, "run")
    write_rows(Path("t.csv"), 20)
    refused(capsys, pretrain_program.main, [*(resume or ["--corpus", "none"]), "--output", "run"],
            "run: a run of train.py; expected", loop.PROGRAM)
    a_run(Path("pretrained"), loop.PROGRAM)
    arguments = resume or ["--train", "t.csv", "--encoder", str(encoder)]
    refused(capsys, train.main, [*arguments, "--run", "pretrained"], f"pretrained: a run of {loop.PROGRAM}; expected")


def test_files_of_two_models_in_one_folder_are_noticed(model, capsys):
    shutil.copytree(model, "mixed")
    assert predict.main([*PAIR, "--model", "mixed"]) == 0
    assert "not as train.py wrote" not in capsys.readouterr().out
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(Path("mixed", name), "kept")
        content = bytearray(Path("mixed", name).read_bytes())
        if name == "model.safetensors":
            content[-1] ^= 1
        Path("mixed", name).write_bytes(bytes(content) + (b"" if name == "model.safetensors" else b" "))
        assert predict.main([*PAIR, "--model", "mixed"]) == 0
        assert f"note: mixed: {name}: not as train.py wrote it" in capsys.readouterr().out
        assert explain_program.main([*PAIR, "--model", "mixed", "--output", "mine.html"]) == 0
        assert f"{name}: not as train.py wrote it" in capsys.readouterr().out
        shutil.move("kept", Path("mixed", name))


def test_a_tokenizer_that_was_added_to_a_model_is_noticed(model, capsys):
    shutil.copytree(model, "added")
    Path("added/special_tokens_map.json").write_text("{}")
    assert predict.main([*PAIR, "--model", "added"]) == 0
    assert "note: added: special_tokens_map.json: not as train.py wrote it" in capsys.readouterr().out


def test_a_saved_judge_replaces_nothing_unless_asked(model, encoder):
    judge = minipref.load_judge(model)
    shutil.copytree(encoder, "encoder")
    before = content(Path("encoder"))
    with pytest.raises(InputError, match="encoder: a folder that is not empty"):
        judge.save("encoder")
    assert content(Path("encoder")) == before
    judge.save("new/model")
    judge.save("new/model", replace=True)
    assert minipref.load_judge("new/model").compare("p", "a", "b") == judge.compare("p", "a", "b")


@pytest.mark.parametrize("mine", ["my notes\n", "two\nlines\n", "/no/newline"])
def test_a_file_of_somebody_else_called_runs_latest_stays(capsys, mine):
    write_text(Path("runs/latest"), mine)
    write_latest(Path("run"))
    assert Path("runs/latest").read_text() == mine
    assert "note: runs/latest cannot be written (it is not a file with a run's path)" in capsys.readouterr().out


def test_the_same_model_twice_is_refused(model, capsys):
    shutil.copytree(model, "copy")
    write_rows(Path("test.csv"), 3, labels=False)
    for twice in (["copy", "./copy"], [str(model), "copy"]):
        refused(capsys, predict.main, ["test.csv", "--model", *twice], "copy: the same model as another one")


@pytest.mark.parametrize("name", ["x.parquet", "x.JSONL", "x.csv.gz"])
def test_an_output_of_another_format_than_csv_is_refused(model, capsys, name):
    write_rows(Path("test.csv"), 3, labels=False)
    refused(capsys, predict.main, ["test.csv", "--model", str(model), "--output", name], name, "CSV")


def test_the_model_of_an_unfinished_run_is_named_so(model, capsys):
    shutil.copytree(model.parent, "run")
    for report, said in (("run/report.json", "run/model"), ("folds/fold-1/report.json", "folds/fold-1/model")):
        Path(said).parent.mkdir(parents=True, exist_ok=True)
        if not Path(said).is_dir():
            shutil.copytree("run/model", said)
            shutil.copy("run/config.json", "folds/config.json")
            Path(report).touch()
        assert predict.main([*PAIR, "--model", said]) == 0
        assert "unfinished" not in capsys.readouterr().out
        Path(report).unlink()
        assert predict.main([*PAIR, "--model", said]) == 0
        assert f"note: {said}: the best model so far of an unfinished run" in capsys.readouterr().out


def test_folds_are_averaged_only_where_all_are_there(model, capsys):
    write_manifest(Path("run"), manifest("train.py") | {"options": {"folds": 2}})
    shutil.copytree(model, "run/fold-1/model")
    write_text(Path("runs/latest"), str(Path("run").resolve()))
    write_rows(Path("test.csv"), 3, labels=False)
    refused(capsys, predict.main, ["test.csv"], "the models of 1 of 2 folds")
    shutil.copytree(model, "run/fold-2/model")
    settings = Path("run/fold-2/model/minipref.json")
    settings.write_text(settings.read_text().replace('"temperature": ', '"temperature": 1'))
    assert predict.main(["test.csv"]) == 0


def test_rows_that_are_named_twice_are_refused(encoder, capsys):
    write_rows(Path("t.csv"), 20)
    shutil.copy("t.csv", "copy.csv")
    assert train.main(["--train", "t.csv", "copy.csv", "--encoder", str(encoder), "--run", "run"]) == 2
    assert "copy.csv: the same content as another file of --train" in capsys.readouterr().err
    assert not Path("run").exists()
