"""Comparison of two runs: equal bytes, or differences with place and size."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "benchmarks"))
import same_numbers

METRICS, MODEL = same_numbers.COMPARED
ROWS = ["step,epoch,log_loss,best", "12,0.5,1.0978528626531006,1", "23,1.0,1.0829274889115872,1", "35,1.5,1.09,0"]
TENSORS = {"pooler.weight": torch.arange(6.0).reshape(2, 3), "classifier.bias": torch.zeros(3), "scale": torch.ones(())}


def made_up_run(folder: Path, rows: list[str] = ROWS, tensors: dict = TENSORS, metadata: dict | None = None) -> Path:
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / METRICS).write_text("\n".join(rows) + "\n")
    save_file(tensors, folder / MODEL, metadata)
    return folder


@pytest.fixture
def differences(tmp_path):
    """A function from a changed run to its differences from the run above."""
    old = made_up_run(tmp_path / "old")

    def compared(**changes) -> dict:
        return same_numbers.compare_runs(old, made_up_run(tmp_path / "new", **changes))
    return compared


def test_equal_runs_have_no_differences(differences):
    assert differences() == {METRICS: [], MODEL: []}


def test_a_metric_that_differs_in_its_last_digit_is_named_with_its_first_step(differences):
    rows = [ROWS[0], ROWS[1], ROWS[2].replace("5872,1", "5873,1"), ROWS[3].replace("1.09", "1.1")]
    assert differences(rows=rows) == {MODEL: [], METRICS: [
        "column log_loss, first at step 23: 1.0829274889115872, now 1.0829274889115873"]}


@pytest.mark.parametrize(("rows", "expected"), [
    (ROWS[:3], "evaluations: 3, now 2"),
    ([line.rpartition(",")[0] for line in ROWS], "columns: step, epoch, log_loss, best; now step, epoch, log_loss"),
    ([f"{line}\r" for line in ROWS], "equal values in different bytes"),
])
def test_a_metrics_file_of_another_shape_is_not_equal(rows, expected, differences):
    assert differences(rows=rows)[METRICS] == [expected]


def test_a_tensor_that_differs_is_named_with_how_many_values_and_how_much(differences):
    changed = TENSORS["pooler.weight"].clone()
    changed[1, 2] += 0.25
    changed[0, 0] = -0.0                                                      # equal to 0.0, but not in its bytes
    assert differences(tensors=TENSORS | {"pooler.weight": changed}) == {METRICS: [], MODEL: [
        "pooler.weight: 2 of 6 values differ, the largest difference is 2.50e-01"]}


@pytest.mark.parametrize(("changes", "expected"), [
    ({"tensors": {"pooler.weight": TENSORS["pooler.weight"], "scale": TENSORS["scale"]}},
     "classifier.bias: only in the old model"),
    ({"tensors": TENSORS | {"new.bias": torch.zeros(3)}}, "new.bias: only in the new model"),
    ({"tensors": TENSORS | {"scale": torch.ones((), dtype=torch.bfloat16)}},
     "scale: torch.float32 (), now torch.bfloat16 ()"),
    ({"metadata": {"format": "pt"}}, "equal tensors in different files: SHA-256 "),
])
def test_a_model_with_other_tensors_or_another_header_is_not_equal(changes, expected, differences):
    found = differences(**changes)[MODEL]
    assert len(found) == 1 and found[0].startswith(expected)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["no-such-commit"], "no-such-commit: no such commit"),
    (["HEAD", "--rows", "no.csv"], "--rows no.csv: no such file"),
    (["HEAD", "--keep", str(ROOT)], "it exists; expected a new folder"),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr(same_numbers, "unpack", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="2"):
        same_numbers.main(arguments)
    assert expected in capsys.readouterr().err


def test_a_run_that_fails_ends_the_comparison_with_its_log(tmp_path, capsys):
    (tmp_path / "train.py").write_text("import os\nprint(os.environ['OMP_NUM_THREADS'], 'threads')\nexit(3)\n")
    with pytest.raises(SystemExit, match="1"):
        same_numbers.train(tmp_path, tmp_path / "rows.csv", "fp32", tmp_path / "fp32-old")
    assert "2 threads\n\nexit code 3: " in capsys.readouterr().err
