"""train.py and predict.py from the command line: outputs, refused input, and resuming."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from small import write_encoder, write_rows

import minipref
import predict
import train
from minipref import metrics
from minipref.checkpoint import load_classifier
from minipref.data import read_pairs
from minipref.explain import __main__ as minipref_explain
from minipref.pretrain import __main__ as minipref_pretrain
from minipref.run import state
from minipref.runtime import InputError, Stopped

ROOT = Path(train.__file__).parent
FAST = ["--recipe", "tiny", "--epochs", "4", "--lr", "5e-3", "--precision", "fp32", "--batch-size", "8",
        "--evals-per-epoch", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in its own folder, without slow figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minipref.run.report.figures_html", lambda figures: "")


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory):
    """A completed run in `folder`, with its rows."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_rows(folder / "train.csv", 400)
    with contextlib.chdir(folder):
        assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "run", *FAST]) == 0
    return folder


def call(capsys, arguments, main=train.main):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- a whole run

def test_a_run_learns_and_writes_what_the_design_promises(finished):
    run = finished / "run"
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.csv", "timing.csv", "report.json", "model",
                                               "state", "valid_predictions.csv", "report.html"}
    log = pd.read_csv(run / "metrics.csv")
    assert log["step"].tolist() == [45, 90, 135, 180] and log["log_loss"].iloc[-1] < 0.5 < log["train_loss"].iloc[0]
    report = json.loads((run / "report.json").read_text())
    assert report["results"]["model, calibrated"]["log_loss"] < report["results"]["length only"]["log_loss"]
    assert set(report["results"]) == {"uniform", "class prior", "length only", "surface features", "model, one order",
                                      "model, both orders", "model, calibrated", "blend"}
    assert report["final"] == "blend" and report["surface_weight"] >= 0
    assert (finished / "runs" / "latest").read_text() == f"{run.resolve()}\n"
    card = (run / "model" / "README.md").read_text()
    assert "train.csv" in card and str(finished) not in card and "| lr | 0.005 |" in card


def test_the_time_that_is_left_is_printed_without_the_slow_first_steps(encoder, tmp_path, monkeypatch, capsys):
    passed, check_step = [0.0], train.check_step

    def slow_at_first(state, *arguments):
        passed[0] += 100 if state.step < 10 else 2
        check_step(state, *arguments)

    monkeypatch.setattr(train, "check_step", slow_at_first)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    rows = write_rows(tmp_path / "train.csv", 400)
    options = ["--recipe", "tiny", "--epochs", "1", "--batch-size", "8", "--evals-per-epoch", "1"]
    code, out, _ = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "run", *options])
    assert code == 0 and "2 s a step: the remaining 25 take 50 s at that speed" in out


def test_rates_schedule_and_smoothing_are_what_the_options_say(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "train.csv", 80)
    options = [*FAST, "--epochs", "2", "--warmup", "0", "--train", str(rows), "--encoder", str(encoder)]
    losses = []
    for run, more in (("plain", []), ("smooth", ["--label-smoothing", "0.5"])):
        assert train.main([*options, "--run", run, "--schedule", "linear", "--layer-decay", "0.5", "--head-lr", "0.01",
                           "--no-blend", *more]) == 0
        log = pd.read_csv(f"{run}/metrics.csv")
        total = log["step"].iloc[-1]
        assert log["lr"].iloc[-1] == pytest.approx(5e-3 / (total + 1)), "a straight line down"
        losses.append(log["train_loss"].iloc[0])
    assert losses[1] > losses[0], "smoothed labels cost more than the labels themselves"
    out = capsys.readouterr().out
    assert "schedule         linear   given on the command line" in out and "layer_decay      0.5" in out
    report = json.loads(Path("plain/report.json").read_text())
    assert report["final"] == "model, calibrated" and report["surface_weight"] == 0


def test_soft_labels_train_as_hard_ones_where_they_are_one_hot_and_teach_otherwise(encoder, tmp_path):
    rows = write_rows(tmp_path / "train.csv", 80)
    text = rows.read_text()
    soft = re.sub(r"(?m)^(.*),1,0,0$", r"\1,0.6,0.3,0.1", text)
    (tmp_path / "soft.csv").write_text(soft)
    assert soft != text
    files = {}
    for run, more in (("hard", ["--train", str(rows)]), ("one-hot", ["--train", str(rows), "--soft-labels"]),
                      ("soft", ["--train", "soft.csv", "--soft-labels"])):
        assert train.main([*FAST, "--epochs", "1", "--encoder", str(encoder), "--run", run, *more]) == 0
        files[run] = [Path(run, name).read_bytes() for name in ("metrics.csv", "model/model.safetensors")]
    assert files["hard"] == files["one-hot"] != files["soft"]


def test_line_breaks_are_a_token_with_newline_token_and_the_model_keeps_it(encoder, tmp_path):
    rows = write_rows(tmp_path / "train.csv", 80)
    options = [*FAST, "--epochs", "1", "--encoder", str(encoder), "--train", str(rows), "--no-blend"]
    assert train.main([*options, "--run", "run", "--newline-token"]) == 0
    judge, plain = minipref.load_judge("run/model"), minipref.load_tokenizer(encoder)
    assert judge.tokenizer.vocab_size == plain.vocab_size + 1 == judge.model.encoder.word_embeddings.num_embeddings
    one_line, two_lines = judge.compare("p", "a b", "c"), judge.compare("p", "a\nb", "c")
    assert one_line != two_lines
    assert train.main([*options, "--run", "without"]) == 0
    judge = minipref.load_judge("without/model")
    assert judge.compare("p", "a b", "c") == judge.compare("p", "a\nb", "c")


def test_a_run_that_stops_before_its_learning_rate_has_fallen_says_so(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "train.csv", 80)
    options = [*FAST, "--epochs", "6", "--lr", "1e-12", "--patience", "1", "--train", str(rows), "--run", "run"]
    assert train.main([*options, "--encoder", str(encoder)]) == 0
    assert "of the peak learning rate" in capsys.readouterr().out


def test_metrics_hold_no_times_and_no_paths(finished):
    log = (finished / "run" / "metrics.csv").read_text()
    assert "second" not in log and str(finished) not in log and "/" not in log


def test_the_newest_runs_model_writes_a_submission(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    test = write_rows(finished / "test.csv", 57, seed=1, labels=False)
    code, out, _ = call(capsys, [str(test)], predict.main)
    assert code == 0 and "57 rows, both orders" in out
    frame = pd.read_csv("submission.csv", dtype={"id": str})
    assert list(frame) == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    assert frame["id"].tolist() == [p.id for p in read_pairs(test, "if present")]
    values = frame.iloc[:, 1:].to_numpy()
    assert np.isfinite(values).all() and abs(values.sum(1) - 1).max() < 1e-6


def test_a_labelled_file_is_scored(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    code, out, _ = call(capsys, [str(write_rows(finished / "labelled.csv", 60, seed=2))], predict.main)
    assert code == 0 and "log loss" in out and "label \\ prediction" in out


def test_one_pair_is_predicted_the_same_from_the_command_line_and_from_python(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    prompt, a, b = "77 the house is", "yes old and red", "no the is red"
    code, out, _ = call(capsys, ["--prompt", prompt, "--a", a, "--b", b, "--precision", "fp32"], predict.main)
    p = minipref.load_judge("run/model").compare(prompt, a, [b])
    assert code == 0 and [float(line.split()[1]) for line in out.splitlines()] == [round(x, 4) for x in p]
    assert p[0] > 0.6 and abs(sum(p) - 1) < 1e-12


def test_python_predicts_the_raw_cells_of_a_file_as_predict_does_and_one_pair_as_many(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    columns = ["prompt", "response_a", "response_b"]
    frame = pd.DataFrame([('["old", "red"]', '["yes", null]', '["no"]'), ('["old"]', "[null]", "['yes']"),
                          ('["is"]', '["\\ud800 yes"]', None), ('["red"]', "[2, 4]", '["[2, 4]"]')], columns=columns)
    frame.to_csv("raw.csv", index_label="id")
    assert call(capsys, ["raw.csv", "--precision", "fp32", "--output", "raw_out.csv"], predict.main)[0] == 0
    judge = minipref.load_judge("run/model")
    found = judge.compare_many(pd.read_csv("raw.csv")[columns].itertuples(index=False))
    assert np.allclose(found, pd.read_csv("raw_out.csv").iloc[:, 1:], atol=1e-7)
    alone = [judge.compare(*row) for row in frame.itertuples(index=False)]
    assert np.allclose(found, alone, atol=1e-6) and judge.compare("p", '["a"]', "b") != judge.compare("p", ["a"], "b")


@pytest.mark.parametrize("arguments", [
    "--model A t.csv", "t.csv --model A", "--output o.csv --model A t.csv", "--model A t.csv --output o.csv",
    "--model A B t.csv", "t.csv --model A B", "--model A --model B t.csv", "--model A t.csv --model B",
    "--model A --model B --output o.csv t.csv", "--model nowhere t.csv"])
def test_the_csv_is_found_before_among_and_after_the_models(arguments):
    for name in "AB":
        Path(name).mkdir()
    Path("t.csv").touch()
    options = predict.parse_arguments(arguments.split())
    assert options.csv == "t.csv" and options.model == [name for name in ("A", "B", "nowhere") if name in arguments]


@pytest.mark.parametrize("parse", [predict.parse_arguments, minipref_explain.parse_arguments])
@pytest.mark.parametrize("text", ["-x", "--", "--b", "-1", "- one\n- two", "--prompt=", "-h", "", "=", "--a"])
def test_a_text_may_begin_with_a_dash(parse, text):
    for pair in ("pab", (text, "a", "b"), ("p", text, text)):
        apart = parse([part for name, value in zip(("--prompt", "--a", "--b"), pair) for part in (name, value)])
        assert (apart.prompt, apart.a, apart.b) == tuple(pair)
        if text != "--":                                       # which argparse drops
            assert parse([f"{name}={value}" for name, value in zip(("--prompt", "--a", "--b"), pair)]) == apart


@pytest.mark.parametrize("name", ["microsoft/deberta-v3-small", "org-1/Some.name_2", "./org/name/"])
def test_a_name_of_the_hub_where_a_folder_belongs_gets_the_command_that_fetches_it(tmp_path, capsys, name):
    rows = str(write_rows(tmp_path / "t.csv", 20))
    Path("text").mkdir()
    Path("text/t.txt").write_text("some words\n\n" * 2000)
    for main, arguments in ((train.main, ["--train", rows, "--run", "r", "--encoder", name]),
                            (predict.main, [rows, "--model", name]), (predict.main, ["--model", name, rows]),
                            (minipref_explain.main, [rows, "--model", name]),
                            (minipref_pretrain.main, ["--corpus", "text", "--output", "p", "--encoder", name])):
        code, _, err = call(capsys, arguments, main)
        plain = name.strip("./")
        assert code == 2 and err.count("\n") == 1 and f"{plain}: no such folder" in err
        assert f'make weights ARGS="--repo {plain} --folder weights/{plain.split("/")[1]}"' in err
    for load in (minipref.load_judge, minipref.load_encoder, minipref.load_classifier, minipref.load_tokenizer):
        with pytest.raises(InputError, match="make weights"):
            load(name)
        for other in ("nowhere", "text/nowhere", "/org/name", "a/b/c", "text/t.txt"):
            with pytest.raises(InputError) as caught:
                load(other)
            assert "make weights" not in str(caught.value)


def test_averaging_both_orders_makes_the_prediction_independent_of_the_order(finished):
    judge = minipref.load_judge(finished / "run" / "model")
    p, q = judge.compare("old", "yes", "no red"), judge.compare("old", "no red", "yes")
    assert np.allclose(p, (q[1], q[0], q[2]), atol=1e-6)


def test_many_rows_are_predicted_in_blocks_and_the_next_is_tokenized_meanwhile(finished, monkeypatch):
    rows = [("old", "yes", "no " * number) for number in range(8)]
    wanted = minipref.load_judge(finished / "run" / "model").compare_many(rows)
    begun = [threading.Event() for _ in range(3)]                        # when each block's tokenization begins
    encode, predict_block = minipref.predictor.encode_pairs, minipref.predictor.predict_logits
    blocks = iter(begun)

    def recorded_encoding(*arguments):
        assert threading.current_thread() is not threading.main_thread()
        next(blocks).set()
        return encode(*arguments)

    def predict_while_the_next_is_tokenized(*arguments, **more):
        predicted.append(len(arguments[1]))
        assert begun[min(len(predicted), 2)].wait(30)
        return predict_block(*arguments, **more)

    predicted = []
    monkeypatch.setattr(minipref.predictor, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(minipref.predictor, "encode_pairs", recorded_encoding)
    monkeypatch.setattr(minipref.predictor, "predict_logits", predict_while_the_next_is_tokenized)
    found = minipref.load_judge(finished / "run" / "model").compare_many(rows)
    assert predicted == [3, 3, 2] and np.allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_several_models_are_averaged(finished, encoder, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    rows = [("old", "yes", "no red"), ("red", "no", "no")]
    test = finished / "two.csv"
    test.write_text("id,prompt,response_a,response_b\n1,old,yes,no red\n2,red,no,no\n")
    assert train.main(["--train", "train.csv", "--encoder", str(encoder), "--run", "other", *FAST, "--seed", "7"]) == 0
    folders = ["run/model", "other/model"]
    arguments = [str(test), "--model", *folders, "--precision", "fp32", "--output", "mean.csv"]
    code, _, _ = call(capsys, arguments, predict.main)
    wanted = np.mean([minipref.load_judge(folder).compare_many(rows) for folder in folders], axis=0)
    assert code == 0 and np.allclose(pd.read_csv("mean.csv").iloc[:, 1:], wanted, atol=1e-7)


def test_transformers_loads_the_trained_model_and_predicts_the_same(finished):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    judge = minipref.load_judge(finished / "run" / "model")
    judge.surface = None                                   # transformers has no blend
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(finished / "run" / "model",
                                                                             dtype=torch.float32).eval()
    tokenizer = judge.tokenizer
    ids = [tokenizer.cls_id, *tokenizer.encode("old"), tokenizer.sep_id, *tokenizer.encode("yes"), tokenizer.sep_id,
           *tokenizer.encode("no red"), tokenizer.sep_id]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([ids])).logits
    wanted = judge.compare_many([("old", "yes", "no red")], swap_average=False)
    assert np.allclose(torch.softmax(logits / judge.temperature, -1).numpy(), wanted, atol=1e-5)
    assert theirs.config.id2label == {0: "A", 1: "B", 2: "tie"}


# --- other ways to train

def test_folds_give_every_row_a_prediction_from_a_model_that_never_saw_it(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 120)
    code, out, _ = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, "--folds", "3"])
    assert code == 0 and "out of fold, 3 models, 120 rows" in out
    assert [len(list(Path(f"r/fold-{k}/state").glob("*.safetensors"))) for k in (1, 2, 3)] == [1, 1, 1]
    held = pd.concat([pd.read_csv(f"r/fold-{k}/valid_predictions.csv", dtype={"id": str}) for k in (1, 2, 3)])
    assert sorted(held["id"]) == sorted(p.id for p in read_pairs(rows))
    oof = pd.read_csv("r/oof.csv", dtype={"id": str})
    assert list(oof) == ["id", "label", "p_a", "p_b", "p_tie", "fold"] and oof["id"].tolist() == [
        p.id for p in read_pairs(rows)], "one row each, in the file's order"
    fold_of = {row: k for k in (1, 2, 3) for row in pd.read_csv(f"r/fold-{k}/valid_predictions.csv", dtype=str)["id"]}
    assert oof["fold"].tolist() == [fold_of[row] for row in oof["id"]]
    report = json.loads(Path("r/report.json").read_text())["results"]["out of fold"]
    labels = [("A", "B", "tie").index(label) for label in oof["label"]]
    scores = metrics.evaluate(oof[["p_a", "p_b", "p_tie"]].to_numpy(), labels)
    assert scores["log_loss"] == pytest.approx(report["log_loss"], abs=1e-5)
    page = Path("r/report.html").read_text()
    assert "3 folds" in page and "out of fold" in page and f"{report['log_loss']:.4f}" in page
    assert predict.main([str(write_rows(tmp_path / "test.csv", 5, labels=False))]) == 0
    assert "3 models" in capsys.readouterr().out


def test_all_rows_trains_on_everything_and_claims_no_score(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 60)
    code, out, _ = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, "--all-rows"])
    assert code == 0 and "there is no score" in out
    report = json.loads(Path("r/report.json").read_text())
    assert report["train_rows"] == 60 and "results" not in report
    assert minipref.load_judge("r/model").temperature == 1.0


def test_a_validation_file_that_shares_prompts_is_warned_of(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 60)
    code, out, _ = call(capsys, ["--train", str(rows), "--valid", str(rows), "--encoder", str(encoder), "--run", "r",
                                 *FAST])
    assert code == 0 and "WARNING: 60 prompts are on both sides" in out


def test_frozen_embeddings_stay_as_they_were(encoder, tmp_path):
    rows = write_rows(tmp_path / "t.csv", 60)
    assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST,
                       "--freeze-embeddings"]) == 0
    before, after = load_classifier(encoder), load_classifier("r/model")
    assert torch.equal(before.encoder.word_embeddings.weight, after.encoder.word_embeddings.weight)
    assert not torch.equal(before.encoder.rel_embeddings.weight, after.encoder.rel_embeddings.weight)


@pytest.mark.slow
def test_checkpointed_activations_give_the_same_run_bit_for_bit(encoder, tmp_path):
    rows = write_rows(tmp_path / "t.csv", 60)
    base = ["--train", str(rows), "--encoder", str(encoder), *FAST]
    assert train.main([*base, "--run", "plain"]) == 0
    assert train.main([*base, "--run", "saving", "--checkpoint-activations"]) == 0
    assert Path("plain/metrics.csv").read_bytes() == Path("saving/metrics.csv").read_bytes()


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    encoder = write_encoder(tmp_path / "still", dropout=0.0)
    rows = write_rows(tmp_path / "t.csv", 58)
    base = ["--train", str(rows), "--encoder", str(encoder), "--recipe", "tiny", "--precision", "fp32", "--epochs", "2",
            "--lr", "1e-3", "--head-dropout", "0", "--all-rows", "--no-swap", "--max-length", "64"]
    assert train.main([*base, "--run", "large", "--batch-size", "58"]) == 0
    assert train.main([*base, "--run", "small", "--batch-size", "15", "--accumulate", "4"]) == 0
    large, small = (load_classifier(f"{name}/model").state_dict() for name in ("large", "small"))
    assert max((large[name] - small[name]).abs().max() for name in large) < 1e-6


@pytest.mark.parametrize("more", [[], ["--checkpoint-activations", "--aux-loss", "0"]])
def test_the_plain_model_trains_as_the_accelerated_one(tmp_path, more):
    """Twelve steps without dropout: equal scores and weights up to rounding, with and without accelerate()."""
    encoder = write_encoder(tmp_path / "still", dropout=0.0)
    rows = write_rows(tmp_path / "t.csv", 60)
    base = ["--train", str(rows), "--encoder", str(encoder), *FAST, "--epochs", "2", "--lr", "1e-3", *more]
    assert train.main([*base, "--run", "fast"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipref.fast.FastSelfAttention.forward", None)   # nothing fast may be called
        assert train.main([*base, "--run", "plain", "--no-fast"]) == 0
    fast, plain = (pd.read_csv(f"{name}/metrics.csv") for name in ("fast", "plain"))
    assert np.allclose(fast, plain, rtol=1e-4, atol=1e-6) and len(fast) == 2
    fast, plain = (load_classifier(f"{name}/model").state_dict() for name in ("fast", "plain"))
    assert max((fast[name] - plain[name]).abs().max() for name in fast) < 1e-5


def test_the_plain_model_predicts_as_the_accelerated_one(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    arguments = [str(write_rows(finished / "plain.csv", 20, seed=4)), "--model", "run/model", "--precision", "fp32"]
    assert predict.main([*arguments, "--output", "fast.csv"]) == 0
    monkeypatch.setattr("minipref.fast.FastSelfAttention.forward", None)
    assert predict.main([*arguments, "--output", "plain-model.csv", "--no-fast"]) == 0
    fast, plain = (pd.read_csv(name) for name in ("fast.csv", "plain-model.csv"))
    assert np.allclose(fast, plain, rtol=0, atol=1e-6)


def test_the_auxiliary_head_is_trained_and_saved_with_the_state_and_is_not_in_the_model(encoder, tmp_path):
    rows = write_rows(tmp_path / "t.csv", 60)
    base = ["--train", str(rows), "--encoder", str(encoder), *FAST, "--epochs", "1"]
    assert train.main([*base, "--run", "with"]) == 0
    assert train.main([*base, "--run", "without", "--aux-loss", "0"]) == 0
    states = {name: state.read_state(f"{name}/state")[0] for name in ("with", "without")}
    assert [name for name in states["with"] if "auxiliary_head" in name and name.startswith("model.")]
    assert not any("auxiliary_head" in name for name in states["without"])
    models = [load_classifier(f"{name}/model").state_dict() for name in states]
    assert models[0].keys() == models[1].keys()
    assert not torch.equal(models[0]["encoder.word_embeddings.weight"], models[1]["encoder.word_embeddings.weight"])


# --- stopping and resuming

def stop_at_check(monkeypatch, number):
    """Simulate a SIGTERM just before the n-th check."""
    checks = 0

    def check(self, *_):
        nonlocal checks
        checks += 1
        if checks == number:
            raise Stopped(signal.SIGTERM)
    monkeypatch.setattr(train.StopSignal, "check", check)


# Mid-epoch, in an evaluation, after one, at the very end.
@pytest.mark.parametrize("check", [1, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 9, 16, 20)), 25])
def test_a_run_stopped_anywhere_and_resumed_ends_as_if_it_had_not_been(encoder, tmp_path, monkeypatch, check):
    rows = write_rows(tmp_path / "t.csv", 120)
    base = ["--train", str(rows), "--encoder", str(encoder), *FAST, "--accumulate", "2"]
    assert train.main([*base, "--run", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at_check(patch, check)
        assert train.main([*base, "--run", "broken"]) == 143
    assert train.main(["--resume", "--run", "broken"]) == 0
    for name in ("metrics.csv", "valid_predictions.csv", "model/model.safetensors", "model/minipref.json"):
        assert Path("whole", name).read_bytes() == Path("broken", name).read_bytes(), name
    whole, broken = (state.read_state(f"{name}/state")[0] for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.slow
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(encoder, tmp_path):
    rows = write_rows(tmp_path / "t.csv", 2000)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--train", str(rows), "--encoder", str(encoder),
                                "--run", "r", *FAST, "--epochs", "200", "--patience", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("steps"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume --run 'r'" in out and "Traceback" not in err
    assert state.has_state("r/state")


def test_signal_handlers_are_put_back_when_a_run_is_over(encoder, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    rows = write_rows(tmp_path / "t.csv", 20)
    assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, "--epochs", "1"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_can_be_resumed_is_not_overwritten(finished, encoder, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    before = Path("run/report.json").read_bytes()
    code, _, err = call(capsys, ["--train", "train.csv", "--encoder", str(encoder), "--run", "run", *FAST])
    assert code == 2 and "--resume" in err and Path("run/report.json").read_bytes() == before


@pytest.mark.parametrize(("arguments", "what"), [
    (["--lr", "1e-4"], "--lr 0.0001, where the run has 0.005"),
    (["--no-swap"], "--no-swap True, where the run has False"),
    (["--warmup", "9"], "--warmup 9.0, where the run has that of its recipe")])
def test_resuming_with_other_hyperparameters_is_refused_by_name(finished, monkeypatch, capsys, arguments, what):
    monkeypatch.chdir(finished)
    code, _, err = call(capsys, ["--resume", "--run", "run", *arguments])
    assert code == 2 and what in err and err.count("\n") == 1


def test_resuming_on_other_rows_is_refused(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 60)
    assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST]) == 0
    write_rows(rows, 60, seed=5)
    code, _, err = call(capsys, ["--resume", "--run", "r"])
    assert code == 2 and "train has changed" in err


def test_a_hyperparameter_of_zero_is_one(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 20)
    zero = ["--head-dropout", "0", "--warmup", "0", "--patience", "0", "--weight-decay", "0", "--seed", "0"]
    assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, *zero]) == 0
    stored = json.loads(Path("r/config.json").read_text())
    assert stored["options"]["seed"] == 0
    assert all(stored["hyperparameters"][name] == 0 for name in ("head_dropout", "warmup", "patience", "weight_decay"))


def test_the_recipe_that_was_called_seed_is_baseline(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 20)
    arguments = ["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST]
    arguments[arguments.index("tiny")] = "seed"
    code, out, _ = call(capsys, [*arguments, "--epochs", "1"])
    assert code == 0 and "note: the recipe 'seed' is now called 'baseline'" in out and "recipe     baseline" in out
    assert json.loads(Path("r/config.json").read_text())["options"]["recipe"] == "baseline"


@pytest.mark.parametrize(("warmup", "said"), [
    (["--warmup", "0.5"], "4 of them warmup;"),
    (["--recipe", "microsoft"], "1 of them warmup (a tenth at most; the recipe has 1,500);")])
def test_warmup_that_is_given_is_obeyed_and_a_recipes_that_is_cut_says_so(encoder, tmp_path, capsys, warmup, said):
    rows = write_rows(tmp_path / "t.csv", 18)
    code, out, _ = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, "--batch-size",
                                 "4", "--epochs", "2", *warmup])
    log = pd.read_csv("r/metrics.csv")
    assert code == 0 and f"steps      8 of 4 rows, {said}" in out
    steps = int(said.split()[0])
    schedule = "linear" if "microsoft" in warmup else "cosine"
    assert log["lr"].tolist() == [train.learning_rates(schedule, step, 9, steps, [5e-3])[0] for step in log["step"]]


def test_recipe_and_hint_follow_the_encoders_content_whatever_its_folder_is_called(encoder, tmp_path, monkeypatch,
                                                                                   capsys):
    bundled = ROOT / "weights" / "minipref-tiny"
    Path("link").symlink_to(bundled)
    shutil.copytree(bundled, "copy")
    shutil.copytree(encoder, "minipref-tiny")
    for folder, is_bundled in ((bundled, True), ("link", True), ("copy", True), ("minipref-tiny", False)):
        options = train.resolve_options({"encoder": str(folder), "train": ["t.csv"], "run": "r"})
        assert options.recipe == "tiny" and bool(train.hints(options)[0]) == is_bundled, folder
    config = json.loads(Path("copy/config.json").read_text())
    Path("copy/config.json").write_text(json.dumps(config | {"hidden_size": 768, "pooler_hidden_size": 768}))
    assert train.resolve_options({"encoder": "copy", "train": ["t.csv"], "run": "r"}).recipe == "baseline"


@pytest.mark.parametrize(("recipe", "why"), [
    ([], "tiny   (the default below a hidden size of 384)"), (["--recipe", "baseline"], "baseline   (given on the")])
def test_the_log_says_why_a_recipe_was_chosen(encoder, tmp_path, capsys, recipe, why):
    rows = write_rows(tmp_path / "t.csv", 12)
    code, out, _ = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "r", "--epochs", "1",
                                 "--all-rows", *recipe])
    assert code == 0 and f"recipe     {why}" in out


def test_a_single_validation_row_is_not_called_collapsed(encoder, tmp_path, capsys):
    rows, valid = write_rows(tmp_path / "t.csv", 12), write_rows(tmp_path / "v.csv", 1)
    code, out, _ = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, "--epochs", "1",
                                 "--valid", str(valid)])
    assert code == 0 and "1 validation rows" in out and "CONSTANT" not in out


# --- refused options

@pytest.mark.parametrize(("arguments", "what"), [
    (["--train", "none.csv"], "none.csv: no such file"),
    (["--encoder", "nowhere"], "nowhere"),
    (["--epochs", "0"], "--epochs"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--recipe", "best"], "--recipe: 'best', expected baseline, competition, microsoft, tiny"),
    (["--folds", "2", "--all-rows"], "--all-rows: not allowed with argument --folds"),
    (["--valid", "v.csv", "--valid-fraction", "0.2"], "--valid-fraction: not allowed with argument --valid"),
    (["--resume"], "--resume without --run"),
    (["--resume", "--run", "nowhere"], "nowhere"),
    (["--unheard-of"], "--unheard-of"),
    (["--limit", "1"], "cannot be split"),
    (["--device", "cuda"] if not torch.cuda.is_available() else ["--device", "mps"], "which this machine"),
])
def test_wrong_arguments_get_one_line_and_exit_code_2(encoder, tmp_path, capsys, arguments, what):
    rows = write_rows(tmp_path / "t.csv", 20)
    base = ["--train", str(rows), "--encoder", str(encoder), "--run", "r"]
    code, _, err = call(capsys, [*base, *arguments] if "--resume" not in arguments else arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("train.py: ") and what in err


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_encoder_without_one_of_its_files_is_refused_by_name(encoder, tmp_path, capsys, broken):
    folder = tmp_path / "half"
    folder.mkdir()
    for file in encoder.iterdir():
        if file.name != broken:
            (folder / file.name).write_bytes(file.read_bytes())
    code, _, err = call(capsys, ["--train", str(write_rows(tmp_path / "t.csv", 20)), "--encoder", str(folder)])
    assert code == 2 and err.count("\n") == 1 and (broken.split(".")[0] in err)


def test_a_half_written_checkpoint_is_refused_and_nothing_is_overwritten(finished, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (finished / "run" / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    mine = "id,winner_model_a,winner_model_b,winner_tie\n1,0.5,0.5,0\n"
    Path("submission.csv").write_text(mine)
    test = write_rows(tmp_path / "t.csv", 3, labels=False)
    for part in range(0, 16):
        (folder / "model.safetensors").write_bytes(whole[:len(whole) * part // 16])
        code, _, err = call(capsys, [str(test), "--model", str(folder)], predict.main)
        assert code == 2 and "model.safetensors" in err and err.count("\n") == 1
    assert Path("submission.csv").read_text() == mine


@pytest.mark.parametrize(("arguments", "what"), [
    ([], "neither a CSV nor"),
    (["--prompt", "p", "--a", "x"], "neither a CSV nor"),
    (["t.csv", "--prompt", "p"], "both a CSV and"),
    (["t.csv", "--model", "nowhere"], "nowhere: no such folder"),
    (["t.csv"], "no run so far"),
])
def test_wrong_arguments_to_predict_get_one_line_and_exit_code_2(capsys, arguments, what):
    code, _, err = call(capsys, arguments, predict.main)
    assert code == 2 and what in err and err.count("\n") == 1


def test_a_duplicate_id_in_a_test_file_stops_prediction_before_anything_is_written(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    Path("twice.csv").write_text("id,prompt,response_a,response_b\n1,p,a,b\n1,p,a,b\n")
    code, _, err = call(capsys, ["twice.csv", "--output", "out.csv"], predict.main)
    assert code == 2 and "twice.csv, row 2, column id" in err and not Path("out.csv").exists()


# --- numbers

def test_a_loss_that_is_not_finite_ends_the_run_with_the_batchs_ids(encoder, tmp_path, capsys):
    rows = write_rows(tmp_path / "t.csv", 40)
    code, _, err = call(capsys, ["--train", str(rows), "--encoder", str(encoder), "--run", "r", *FAST, "--lr", "1e30"])
    assert code == 1 and "Traceback" not in err and err.count("\n") == 1
    assert any(p.id in err for p in read_pairs(rows)) and "--lr" in err
