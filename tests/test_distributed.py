"""Several processes train and predict like one: same rows, steps, scores and errors."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, gradients, padded_batch, resized
from ranks import ROOT, TORCHRUN, die_at_step, poison_at_step, run_ranks, signal_at_step
from small import write_encoder, write_rows

import minipref
import predict
import train
from minipref import metrics
from minipref.data import encode_pairs, read_pairs
from minipref.model import PreferenceModel
from minipref.predictor import predict_logits
from minipref.run import distributed, state

# 33 rows in batches of 8: five steps an epoch, the last of a single row, for which most ranks have nothing to do.
TWENTY_STEPS = ["--train", "t.csv", "--valid", "v.csv", "--recipe", "tiny", "--precision", "fp32", "--epochs", "4",
                "--batch-size", "8", "--lr", "2e-5", "--head-dropout", "0", "--evals-per-epoch", "1",
                "--max-length", "64", "--patience", "0"]
SHORT = ["--train", "t.csv", "--valid", "v.csv", "--recipe", "tiny", "--precision", "fp32", "--epochs", "3",
         "--batch-size", "8", "--lr", "3e-3", "--evals-per-epoch", "1"]


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """An encoder without dropout."""
    return write_encoder(tmp_path_factory.mktemp("still"), dropout=0.0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test runs in its own folder with training and validation rows, with one thread like each rank."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.csv", 33)
    write_rows(tmp_path / "v.csv", 150, seed=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_all_ended_well(ranks):
    for rank, ended in enumerate(ranks):
        assert ended.code == 0, f"rank {rank}: {ended.err}"


def assert_same_run(one: str, several: str, weights: float, moments: float) -> None:
    """Compares the weights and, relative to each tensor's largest entry, the means of gradients of two runs."""
    (one, facts), (several, others) = (state.read_state(Path(run, "state")) for run in (one, several))
    assert facts["step"] == others["step"] and facts["state"]["lr"] == others["state"]["lr"]
    for name, value in one.items():
        difference = (value.double() - several[name].double()).abs().max().item()
        if name.startswith("model."):
            assert difference < weights, name
        elif name.endswith("exp_avg"):
            assert difference < moments * value.abs().max().item(), name


# --- the same run

@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_run_is_that_of_one_process(still, size):
    arguments = [*TWENTY_STEPS, "--encoder", str(still)]
    assert train.main([*arguments, "--run", "one"]) == 0
    ranks = run_ranks(size, "train", [*arguments, "--run", "several"])
    assert_all_ended_well(ranks)
    assert state.read_state("several/state")[1]["step"] == 20
    assert_same_run("one", "several", weights=1e-6, moments=1e-4)
    one, several = (pd.read_csv(f"{run}/metrics.csv") for run in ("one", "several"))
    assert np.allclose(one, several, rtol=1e-6, atol=0)


def test_only_the_main_process_prints_and_writes(still):
    ranks = run_ranks(3, "train", [*TWENTY_STEPS, "--encoder", str(still)])
    assert_all_ended_well(ranks)
    assert "3 processes" in ranks[0].out and ranks[0].out.count("ended:") == 1
    assert [ended.out + ended.err for ended in ranks[1:]] == ["", ""]
    run, = (path for path in Path("runs").iterdir() if path.is_dir())           # one name, though each has its clock
    assert Path("runs/latest").read_text() == f"{run.resolve()}\n"
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.csv", "timing.csv", "report.json", "model",
                                                     "state", "valid_predictions.csv", "report.html"}


def test_accumulated_micro_batches_of_several_processes_are_one_large_batch(still):
    """33 rows in micro-batches of 5, two per step: the last step has one micro-batch of 3 rows, for 2 ranks."""
    base = [*TWENTY_STEPS, "--encoder", str(still), "--lr", "1e-3", "--epochs", "1"]
    small = ["--batch-size", "5", "--accumulate", "2"]
    assert train.main([*base, *small, "--run", "one"]) == 0
    assert_all_ended_well(run_ranks(2, "train", [*base, *small, "--run", "several"]))
    assert_same_run("one", "several", weights=1e-5, moments=1e-4)


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    """A completed run of three processes with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "t.csv", 33)
    write_rows(folder / "v.csv", 150, seed=9)
    with contextlib.chdir(folder):
        assert_all_ended_well(run_ranks(3, "train", [*SHORT, "--encoder", str(encoder), "--run", "whole"]))
    return folder / "whole"


def test_the_score_is_that_of_one_process_on_the_same_weights(whole):
    judge = minipref.load_judge(whole / "model")
    tokenized = encode_pairs(list(read_pairs("v.csv")), judge.tokenizer, judge.max_length)
    logits = predict_logits(judge.model, tokenized, judge.tokenizer, 128 * judge.max_length, 128)
    wanted = metrics.evaluate(metrics.swap_averaged(logits, 1.0), tokenized.labels)
    found = json.loads((whole / "report.json").read_text())["results"]["model, both orders"]
    assert found["rows"] == 150 and found["confusion"] == wanted["confusion"]
    for name in ("log_loss", "accuracy", "precision", "recall", "f1", "ece"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-12)


def test_early_stopping_stops_all(encoder):
    """At this learning rate the score gets worse from the first evaluation on."""
    arguments = [*SHORT, "--encoder", str(encoder), "--run", "r", "--lr", "0.3", "--epochs", "30", "--patience", "1"]
    ranks = run_ranks(2, "train", arguments)
    assert_all_ended_well(ranks)
    assert "ended: no better log loss in 1 evaluations" in ranks[0].out


@pytest.mark.slow
def test_folds_give_every_row_a_prediction(encoder):
    write_rows(Path("t.csv"), 90)
    arguments = [*SHORT, "--encoder", str(encoder), "--run", "r", "--folds", "3"]
    del arguments[2:4]                                                           # folds validate on their own rows
    ranks = run_ranks(2, "train", arguments)
    assert_all_ended_well(ranks)
    assert "out of fold, 3 models, 90 rows" in ranks[0].out
    held = pd.concat([pd.read_csv(f"r/fold-{k}/valid_predictions.csv", dtype={"id": str}) for k in (1, 2, 3)])
    assert sorted(held["id"]) == sorted(p.id for p in read_pairs("t.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--checkpoint-activations"], ["--freeze-embeddings"], ["--precision", "bf16"],
                                     ["--all-rows"]])
def test_every_way_to_train_works_in_several_processes(still, options):
    base = [*TWENTY_STEPS, "--encoder", str(still), *options]
    if options == ["--all-rows"]:
        del base[2:4]
    assert train.main([*base, "--run", "one"]) == 0
    assert_all_ended_well(run_ranks(2, "train", [*base, "--run", "several"]))
    low = "bf16" in options
    assert_same_run("one", "several", weights=1e-4 if low else 1e-6, moments=0.1 if low else 1e-4)


# --- the rule that makes it so

def test_every_parameter_has_a_gradient_or_ddp_would_wait_for_it():
    """DDP raises an error for a trainable parameter without gradient; the [CLS]-only last layer must have none.

    DDP would detect it in the second forward pass.
    """
    model = PreferenceModel(resized(SMALL, num_hidden_layers=3))
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for lengths in ([20, 9], [4]):
            wrapped.zero_grad(set_to_none=True)
            wrapped(*padded_batch(SMALL, lengths)).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()
    assert all(g.abs().sum() > 0 for name, g in gradients(model).items() if "bias" not in name)


@pytest.fixture(params=[1, 2, 3, 5])
def group(request, monkeypatch):
    """A function that pretends to be a rank of a group, for functions that need no communication."""
    monkeypatch.setattr(distributed, "world_size", lambda: request.param)
    return request.param, lambda rank: monkeypatch.setattr(distributed, "rank", lambda: rank)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
def test_shards_of_a_batch_are_its_rows_once_each_and_weigh_alike(group, rows):
    size, be = group
    batch, swapped = np.arange(10, 10 + rows), np.arange(rows) % 2 == 0
    weight_of = dict.fromkeys(batch.tolist(), 0)
    for rank in range(size):
        be(rank)
        mine, mine_swapped, weight = distributed.shard_batch(batch, swapped)
        assert len(mine) > 0, "a rank that computes nothing would let the others wait"
        for row, swap in zip(mine.tolist(), mine_swapped):
            weight_of[row] += weight
            assert swap == swapped[row - 10]
    assert set(weight_of.values()) == {size}


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_batches_are_sharded_once_each_in_equally_many_turns(group, count):
    size, be = group
    batches, shards = [np.array([n, n]) for n in range(count)], []
    for rank in range(size):
        be(rank)
        shards.append(distributed.shard_batches(batches))
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(int(batch[0]) for shard in shards for batch in shard if len(batch)) == list(range(count))


def test_each_rank_draws_its_own_dropout_and_rank_0_what_one_process_would(group):
    size, be = group
    draws = []
    for rank in range(size):
        be(rank)
        torch.manual_seed(42)
        distributed.seed_rank(42)
        draws.append(torch.rand(3).tolist())
    torch.manual_seed(42)
    assert draws[0] == torch.rand(3).tolist() and len({tuple(draw) for draw in draws}) == size


# --- stopping and resuming

def test_a_signal_to_one_stops_all_and_the_run_resumes_exactly(encoder, whole):
    """With dropout: each rank's generator must be restored."""
    arguments = [*SHORT, "--encoder", str(encoder), "--run", "broken"]
    ranks = run_ranks(3, "train", arguments, before=signal_at_step(7, victim=2))
    assert [ended.code for ended in ranks] == [143] * 3
    assert "stopped; the state is saved" in ranks[0].out and state.read_state("broken/state")[1]["step"] == 7
    assert_all_ended_well(run_ranks(3, "train", ["--resume", "--run", "broken"]))
    for name in ("metrics.csv", "valid_predictions.csv", "model/model.safetensors", "model/minipref.json"):
        assert (whole / name).read_bytes() == Path("broken", name).read_bytes(), name
    wanted, found = (state.read_state(run / "state")[0] for run in (whole, Path("broken")))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
def test_a_run_resumes_with_more_or_fewer_processes_and_notes_that_it_is_not_the_same(encoder):
    arguments = [*SHORT, "--encoder", str(encoder), "--run", "r"]
    run_ranks(2, "train", arguments, before=signal_at_step(4, victim=0))
    assert state.read_state("r/state")[1]["step"] == 4
    ranks = run_ranks(3, "train", ["--resume", "--run", "r"], before=signal_at_step(4, victim=1))
    assert "note: processes has changed (it was 2 and is 3)" in ranks[0].out
    assert [ended.code for ended in ranks] == [143] * 3
    assert train.main(["--resume", "--run", "r"]) == 0


def test_a_process_that_dies_ends_the_run_with_a_message(encoder):
    arguments = [*SHORT, "--encoder", str(encoder), "--run", "r", "--save-every", "0"]
    ranks = run_ranks(3, "train", arguments, before=die_at_step(6, victim=1))
    assert [ended.code for ended in ranks] == [1, -signal.SIGKILL, 1]
    for ended in (ranks[0], ranks[2]):
        assert "another process of the run has ended" in ended.err and "Traceback" not in ended.err
    assert state.read_state("r/state")[1]["step"] == 5
    assert train.main(["--resume", "--run", "r"]) == 0


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_one_line(encoder):
    ranks = run_ranks(3, "train", [*SHORT, "--encoder", str(encoder), "--run", "r"], before=poison_at_step(2, victim=1))
    assert [ended.code for ended in ranks] == [1] * 3
    assert ranks[0].err.startswith("train.py: step 2: loss nan") and ranks[0].err.count("\n") == 1
    assert ranks[1].err == ranks[2].err == ""


def test_an_input_error_is_printed_once(encoder):
    ranks = run_ranks(2, "train", ["--train", "none.csv", "--encoder", str(encoder), "--run", "r"])
    assert [ended.code for ended in ranks] == [2, 2]
    assert "none.csv: no such file" in ranks[0].err and ranks[0].err.count("\n") == 1 and ranks[1].err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(minipref.runtime.InputError, match="4 processes on a machine with 0 GPUs"):
        distributed.local_device(torch.device("cuda"))
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")


# --- prediction

@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory, encoder):
    """A trained model."""
    folder = tmp_path_factory.mktemp("judge")
    write_rows(folder / "t.csv", 100)
    with contextlib.chdir(folder):
        assert train.main(["--train", "t.csv", "--encoder", str(encoder), "--run", "r", "--recipe", "tiny", "--epochs",
                           "2", "--lr", "3e-3", "--precision", "fp32"]) == 0
    return folder / "r" / "model"


@pytest.mark.parametrize(("size", "rows"), [(2, 57), (3, 2)])
def test_several_processes_write_one_ordered_submission(judge_folder, size, rows):
    write_rows(Path("test.csv"), rows, seed=3)
    arguments = ["test.csv", "--model", str(judge_folder), "--precision", "fp32"]
    ranks = run_ranks(size, "predict", [*arguments, "--output", "several.csv"])
    assert_all_ended_well(ranks)
    assert ranks[0].out.count(f"{rows} rows, both orders") == 1 and "log loss" in ranks[0].out and ranks[1].out == ""
    assert predict.main([*arguments, "--output", "one.csv"]) == 0
    one, several = (pd.read_csv(name, dtype={"id": str}) for name in ("one.csv", "several.csv"))
    assert one["id"].tolist() == several["id"].tolist()
    assert np.allclose(one.iloc[:, 1:], several.iloc[:, 1:], rtol=0, atol=1e-6)


# --- under torchrun itself

def torchrun(size: int, program: str, arguments: list[str], **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, str(size), "--", str(ROOT / f"{program}.py"), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options)


@pytest.mark.slow
def test_torchrun_trains(still):
    arguments = [*TWENTY_STEPS, "--encoder", str(still)]
    process = torchrun(2, "train", [*arguments, "--run", "several"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("ended: all 4 epochs done") == 1, err
    assert train.main([*arguments, "--run", "one"]) == 0
    assert_same_run("one", "several", weights=1e-6, moments=1e-4)


@pytest.mark.slow
def test_torchrun_predicts(judge_folder):
    write_rows(Path("test.csv"), 57, seed=3, labels=False)
    process = torchrun(2, "predict", ["test.csv", "--model", str(judge_folder)])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("57 rows, both orders") == 1, err
    assert len(pd.read_csv("submission.csv")) == 57


def torchrun_after_an_epoch(encoder) -> subprocess.Popen:
    """Two processes in an endless run in `r`, after an evaluation."""
    write_rows(Path("t.csv"), 2000)
    process = torchrun(2, "train", [*SHORT, "--encoder", str(encoder), "--run", "r", "--epochs", "200"])
    assert any(line.startswith("epoch") for line in process.stdout)
    return process


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_the_state(encoder):
    process = torchrun_after_an_epoch(encoder)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped; the state is saved" in out and state.has_state("r/state")


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed(encoder):
    process = torchrun_after_an_epoch(encoder)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True,
                              check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "another process of the run has ended" in err and "Signal 9 (SIGKILL)" in err
