"""The tables of encoders and baselines: scored on the right rows; finished runs are not repeated."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from small import write_encoder, write_rows

import minipref
from minipref import metrics
from minipref.data import character_counts, read_pairs, split_by_prompt

sys.path.insert(0, str(ROOT / "benchmarks"))
import experiments


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that runs the program with a temporary file for results, and returns the table's rows."""
    monkeypatch.setattr(experiments, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(experiments, "by_words", lambda train, labels, valid, seed: np.full((len(valid), 3), 1 / 3))

    def call(*arguments: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["experiments.py", "small", *map(str, arguments)])
        experiments.main()
        return json.loads((tmp_path / "figures.json").read_text())["small"]["rows"]
    return call


def log_loss(folder, csv) -> float:
    pairs = list(read_pairs(csv))
    return metrics.evaluate(minipref.load_judge(folder).compare_many(pairs), [p.label for p in pairs])["log_loss"]


@pytest.mark.slow
def test_with_test_rows_the_kept_model_is_judged_on_those(tmp_path, measure):
    encoder, rows = write_encoder(tmp_path / "small"), write_rows(tmp_path / "rows.csv", 80)
    test = write_rows(tmp_path / "test.csv", 60, seed=9)
    command = ("--train", rows, "--test", test, "--encoders", f"small={encoder}", "--seeds", 3, "--runs",
               tmp_path / "runs", "--options", "--epochs 1 --evals-per-epoch 1 --lr 1e-3 --max-length 32")
    found = measure(*command)
    run = tmp_path / "runs" / "small" / "small-3" / "run"
    report = json.loads((run / "report.json").read_text())
    assert found["small"]["3"]["log_loss"] == round(log_loss(run / "model", test), 5)
    assert found["small"]["3"]["valid_log_loss"] == round(report["results"]["model, calibrated"]["log_loss"], 5)
    assert found["small"]["3"]["valid_log_loss"] != found["small"]["3"]["log_loss"]

    pairs, judged = list(read_pairs(rows)), list(read_pairs(test))               # the baselines: fitted on the part
    labels = np.array([p.label for p in pairs])                                  # that trains, scored on the test rows
    part = split_by_prompt([p.prompt for p in pairs], labels, (0.9, 0.1), 3)
    expected = metrics.baselines(character_counts(pairs)[part == 0], labels[part == 0], character_counts(judged),
                                 np.array([p.label for p in judged]))
    for name in ("uniform", "class prior", "length only"):
        assert found[name]["3"]["log_loss"] == round(expected[name]["log_loss"], 5)

    before = {path: path.stat().st_mtime_ns for path in run.glob("state/*")}
    again = measure(*command, "--again")                                         # the run is over: nothing to train
    assert before and {path: path.stat().st_mtime_ns for path in run.glob("state/*")} == before
    assert again == found


@pytest.mark.slow
def test_without_a_part_the_options_reach_the_run_and_its_validation_rows_are_scored(tmp_path, measure):
    rows = write_rows(tmp_path / "rows.csv", 80)
    found = measure("--train", rows, "--encoders", "--without", "swap", "--seeds", 2, "--runs", tmp_path / "runs",
                    "--valid-fraction", 0.3, "--options", "--epochs 1 --lr 1e-3 --max-length 32")["without swap"]["2"]
    run = tmp_path / "runs" / "small" / "without-swap-2" / "run"
    report = json.loads((run / "report.json").read_text())
    assert "--no-swap" in report["command"].split()
    results = report["results"]
    assert found["log_loss"] == round(results["model, calibrated"]["log_loss"], 5)
    assert found["one_order"] == round(results["model, one order"]["log_loss"], 5)
    assert found["both_orders"] == round(results["model, both orders"]["log_loss"], 5)
    assert found["last"] == round(pd.read_csv(run / "metrics.csv")["log_loss"].iloc[-1], 5)

    rows = pd.read_csv(run / "valid_predictions.csv")
    assert found["auc_tie"] == experiments.area(rows["label"] == "tie", rows["p_tie"])
    decided = rows[rows["label"] != "tie"]
    assert found["auc_winner"] == experiments.area(decided["label"] == "A", decided["p_a"] - decided["p_b"])


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    pytest.importorskip("sklearn")
    positive, score = np.array([True, True, False, False, False]), np.array([0.9, 0.4, 0.5, 0.1, 0.4])
    assert experiments.area(positive, score) == round((3 + 1.5) / 6, 3)          # 0.4 and 0.4: half a pair


def test_a_column_that_tells_the_answer_is_worth_nearly_everything_and_is_read_for_the_right_rows(tmp_path, measure,
                                                                                                 capsys):
    rows, test = (write_rows(tmp_path / f"{name}.csv", 90, seed) for name, seed in (("rows", 1), ("test", 2)))
    frames = {path: pd.read_csv(path, dtype=str, keep_default_na=False) for path in (rows, test)}
    for path, frame in frames.items():
        frame["model_a"] = frame[["winner_model_a", "winner_model_b", "winner_tie"]].idxmax(axis=1)
        frame.to_csv(path, index=False)
    for more in ([], ["--test", test], ["--valid", test]):
        found = measure("--train", rows, *more, "--encoders", "--seeds", 1, "--again", "--by", "model_a")
        assert found["class prior by model_a"]["1"]["accuracy"] == 1.0
        assert found["class prior by model_a"]["1"]["log_loss"] < 0.3 < found["class prior"]["1"]["log_loss"]
    found = measure("--train", rows, "--encoders", "--seeds", 1, "--again", "--by", "id")         # which tells nothing
    assert found["class prior by id"]["1"]["log_loss"] == pytest.approx(found["class prior"]["1"]["log_loss"], abs=1e-2)
    with pytest.raises(SystemExit):
        measure("--train", rows, "--test", test, "--encoders", "--by", "source")
    assert f"--by source: no such column in {rows}" in capsys.readouterr().err


def test_a_kinds_class_shares_are_drawn_to_those_of_all_rows_as_by_five_more():
    found = experiments.by_kind(["x", "x", "y", "y"], np.array([0, 0, 1, 2]), ["x", "y", "z"])
    overall = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(found, [([2, 0, 0] + 5 * overall) / 7, ([0, 1, 1] + 5 * overall) / 7, overall])


def test_the_share_of_the_gap_is_each_seeds_own():
    prior = {"1": {"log_loss": 1.1, "bayes_optimal": 0.6}, "2": {"log_loss": 1.0, "bayes_optimal": 0.6}}
    by_seed = {"1": {"log_loss": 0.85}, "2": {"log_loss": 0.7}}
    assert np.allclose(experiments.gap_closed(by_seed, prior), [0.5, 0.75])


def test_the_table_has_every_row_with_its_seeds_and_its_command():
    prior = {"1": {"log_loss": 1.0, "accuracy": 0.4, "bayes_optimal": 0.5},
             "2": {"log_loss": 1.1, "accuracy": 0.5, "bayes_optimal": 0.5}}
    better = {"1": {"log_loss": 0.75, "accuracy": 0.6, "minutes": 2.0, "last": 0.9, "auc_tie": 0.75},
              "2": {"log_loss": 0.8, "accuracy": 0.7, "minutes": 4.0, "last": 0.8, "auc_tie": 0.5}}
    how = {"command": "python benchmarks/experiments.py small --train a.csv", "machine": "2 cores"}

    def cells(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]

    text = experiments.table({"rows": {"uniform": {}, "class prior": prior, "bundled": better},
                              "how": {"class prior": how, "bundled": how}})
    assert cells(text) == [
        ["", "log loss", "gap closed", "accuracy", "last evaluation, one order", "log loss per seed"],
        ["---", "---:", "---:", "---:", "---:", "---"],
        ["class prior", "1.0500", "0%", "0.450", "", "1.0000, 1.1000"],
        ["bundled", "0.7750", "50%", "0.650", "0.8500", "0.7500, 0.8000"],
        ["Bayes-optimal", "0.5000", "100%", "", "", ""]]
    assert text.endswith("- class prior, bundled: `python benchmarks/experiments.py small --train a.csv` (2 cores)")

    real = {seed: {"log_loss": x["log_loss"], "accuracy": x["accuracy"]} for seed, x in prior.items()}
    assert cells(experiments.table({"rows": {"class prior": real, "bundled": better}, "how": {}})) == [
        ["", "log loss", "accuracy", "AUC, tie", "log loss per seed"], ["---", "---:", "---:", "---:", "---"],
        ["class prior", "1.0500", "0.450", "", "1.0000, 1.1000"],
        ["bundled", "0.7750", "0.650", "0.62", "0.7500, 0.8000"]]


def test_a_command_is_shown_with_short_paths():
    given = ["real", "--train", "/data/autoj.csv", "b.csv", "--encoders", "bundled", "es=/runs/es/model", "nes=x"]
    assert experiments.without_paths(given) == ["real", "--train", "autoj.csv", "b.csv", "--encoders", "bundled",
                                                "es=es/model", "nes=x"]


def test_words_tell_apart_what_they_can(tmp_path):
    """'yes' wins against 'no': TF-IDF of A minus B learns this, and predicts it for new prompts."""
    pytest.importorskip("sklearn")
    train, valid = (list(read_pairs(write_rows(tmp_path / f"{seed}.csv", 200, seed))) for seed in (1, 2))
    labels, valid_labels = (np.array([p.label for p in pairs]) for pairs in (train, valid))
    found = experiments.by_words(train, labels, valid, 1)
    assert metrics.evaluate(found, valid_labels)["accuracy"] > 0.95
