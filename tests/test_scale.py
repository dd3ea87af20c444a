"""Larger encoders and lower precisions: checks before the use of a larger machine."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import NO_DROPOUT, large_model, padded_batch, reference_model, relative, resized
from small import write_encoder, write_rows

import train
from minipref.checkpoint import load_classifier, save_classifier
from minipref.config import EncoderConfig
from minipref.fast import accelerate
from minipref.model import PreferenceModel, init_weights
from minipref.optim import AdamW, decay_groups
from minipref.runtime import autocast

ROOT = Path(train.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402 - this needs the path

SHAPES = {  # the published ones: hidden size, layers, heads, parameters with pooler and classifier
    "v3-xsmall": (384, 12, 6, 70_831_107),
    "v3-small": (768, 6, 12, 141_897_219),
    "v3-base": (768, 12, 12, 184_424_451),
    "v3-large": (1024, 24, 16, 435_064_835),
}


# --- larger encoders

@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_the_published_ones(name):
    config, (width, layers, heads, parameters) = memory.SIZES[name], SHAPES[name]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, layers, heads)
    assert config.intermediate_size == 4 * width and config.head_size == 64 and config.vocab_size == 128_100
    with torch.device("meta"):
        assert sum(p.numel() for p in PreferenceModel(config).parameters()) == parameters


def check_shape(config: EncoderConfig, folder: Path, lengths: list[int]) -> None:
    """Build, save, load, accelerate, match transformers, train a step."""
    torch.manual_seed(0)
    save_classifier(large_model(config), folder)
    model = accelerate(load_classifier(folder))
    ids, attention_mask = padded_batch(config, lengths)
    reference = reference_model(model)
    with torch.no_grad():
        wanted = reference(ids, attention_mask=attention_mask.long()).logits
        assert relative(model(ids, attention_mask), wanted) < 1e-4
    del reference

    # A step in the wrong direction would not lower the loss; a fresh start has gentle gradients.
    init_weights(model, 0.02)
    optimizer = AdamW(decay_groups(model.train(), 0.01), lr=1e-4)
    labels = torch.tensor([0, 2])
    losses = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(ids, attention_mask), labels)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["v3-xsmall", "v3-base", pytest.param("v3-large", marks=pytest.mark.slow)])
def test_other_widths_load_match_transformers_and_train(name, tmp_path):
    """Full hidden size, heads and feed-forward, but only two layers and a small vocabulary."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    check_shape(resized(memory.SIZES[name], num_hidden_layers=2, vocab_size=300, **NO_DROPOUT), tmp_path, [150, 131])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3-xsmall", "v3-base", "v3-large"])
def test_other_sizes_in_full_load_match_transformers_and_train(name, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    check_shape(resized(memory.SIZES[name], **NO_DROPOUT), tmp_path, [40, 23])


LOADING = """
import sys
from pathlib import Path
from minipref.checkpoint import load_classifier

def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024

first = load_classifier(sys.argv[1])         # with what torch imports and sets up at its first use
before = private()
second = load_classifier(sys.argv[1])
print(private() - before)
second.encoder.word_embeddings.weight.data.add_(1)
print(private() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="only Linux tells private from shared memory")
def test_a_loaded_model_lies_in_its_file_until_it_is_trained(tmp_path):
    """Several processes that load one float32 file share its pages at the start."""
    config = EncoderConfig(vocab_size=30_000, hidden_size=384, num_attention_heads=6, num_hidden_layers=2,
                           intermediate_size=1536)
    save_classifier(large_model(config), tmp_path)
    megabytes = (tmp_path / "model.safetensors").stat().st_size / 2**20
    done = subprocess.run([sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=ROOT)
    loaded, trained = map(float, done.stdout.split())
    assert megabytes > 50 and loaded < 0.3 * megabytes, "MB of memory of its own"
    assert trained > 0.7 * megabytes, "the word embeddings, once they have been written to"


# --- precisions

def learn(precision: str, rows: int = 64, steps: int = 30, scaler=None) -> tuple[list[float], list[float], list[bool]]:
    """Train a small encoder on one batch by hand: losses, loss scales, and whether each step changed the weights."""
    torch.manual_seed(0)
    config = EncoderConfig(vocab_size=60, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
                           intermediate_size=64, position_buckets=16, max_distance=64, **NO_DROPOUT)
    model = accelerate(large_model(config)).train()
    init_weights(model, 0.1)
    ids, attention_mask = padded_batch(config, [12, 9] * (rows // 2))
    labels = ids[:, 1] % 3
    optimizer = AdamW(decay_groups(model, 0.01), lr=3e-3)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    losses, scales, moved = [], [], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), precision):
            logits = model(ids, attention_mask)
        loss = F.cross_entropy(logits.float(), labels)
        scaler.scale(loss).backward()
        before = model.classifier.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, model.classifier.weight))
    return losses, scales, moved


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_precision_learns(precision):
    losses, _, moved = learn(precision)
    assert losses[0] > 0.9 and losses[-1] < 0.5 * losses[0]
    assert moved[-1] and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_each_precision_learns_in_a_run(tmp_path, monkeypatch):
    """train.py on rows with a rule: far below the class-prior baseline of 1.06."""
    monkeypatch.chdir(tmp_path)
    rows, encoder = write_rows(tmp_path / "t.csv", 300), write_encoder(tmp_path / "encoder", dropout=0.0)
    for precision in ("fp32", "bf16"):                                    # fp16 in the test after the next
        assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", precision, "--recipe", "tiny",
                           "--epochs", "6", "--lr", "5e-3", "--batch-size", "8", "--head-dropout", "0", "--precision",
                           precision, "--evals-per-epoch", "1", "--patience", "0"]) == 0
        report = json.loads(Path(precision, "report.json").read_text())
        assert report["results"]["model, both orders"]["log_loss"] < 0.6, precision


def test_an_overflow_skips_the_step_halves_the_scale_and_the_scale_recovers():
    """A scale of 2^40 overflows float16 in the backward pass; it is halved until the gradients fit, and grows again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=5)
    losses, scales, moved = learn("fp16", steps=45, scaler=scaler)
    first = moved.index(True)
    assert first > 3, "steps without an overflow were to be forced"
    assert scales[:first] == [2.0 ** (40 - n) for n in range(1, first + 1)] and not any(moved[:first])
    assert losses[:first + 1] == [losses[0]] * (first + 1), "a skipped step moves nothing"
    lowest = min(scales)
    assert max(scales[scales.index(lowest):]) >= 2 * lowest, "after five good steps it is doubled"
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_in_fp16_counts_skipped_steps_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, encoder = write_rows(tmp_path / "t.csv", 200), write_encoder(tmp_path / "encoder", dropout=0.0)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**32))
    assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "r", "--recipe", "tiny", "--epochs",
                       "6", "--lr", "5e-3", "--batch-size", "8", "--head-dropout", "0", "--precision", "fp16",
                       "--patience", "0"]) == 0
    report = json.loads(Path("r/report.json").read_text())
    assert 3 < report["skipped_steps"] < 25
    assert report["results"]["model, both orders"]["log_loss"] < 0.6


def test_a_run_whose_every_step_overflows_gives_up_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows, encoder = write_rows(tmp_path / "t.csv", 200), write_encoder(tmp_path / "encoder", dropout=0.0)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=2.0**120))
    assert train.main(["--train", str(rows), "--encoder", str(encoder), "--run", "r", "--recipe", "tiny", "--precision",
                       "fp16", "--batch-size", "4"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"train.py: step {train.MAX_SKIPPED + 1}: ") and err.count("\n") == 1


# --- memory on paper

def test_bytes_are_counted_from_birth_to_death():
    with memory.FakeTensorMode(), memory.LiveBytes() as live:
        a = torch.zeros(1000)                                             # 4,000
        b = a.view(10, 100) + 1                                           # 8,000: a view is nothing of its own
        assert live.now == live.peak == 8000
        del a
        b.add_(1)                                                         # in place
        assert (live.now, live.peak) == (4000, 8000)
        c = b @ torch.ones(100, 500)                                      # 200,000 that die, and 20,000
        assert (live.now, live.peak) == (24_000, 224_000) and c.shape == (10, 500)


def test_a_steps_memory_is_what_it_must_be():
    config = resized(memory.SIZES["v3-small"], vocab_size=4000, num_hidden_layers=3)
    with torch.device("meta"):
        weights = sum(4 * p.numel() for p in PreferenceModel(config).parameters())
    counted = {(precision, checkpoint): memory.step_bytes(config, 8, 256, precision, checkpoint)
               for precision in ("fp32", "bf16") for checkpoint in (False, True)}
    for found in counted.values():
        assert (found["weights"], found["gradients"], found["moments"]) == (weights, weights, 2 * weights)
        assert found["peak"] > 4 * weights
    plain, saving = (counted["fp32", checkpoint]["peak"] for checkpoint in (False, True))
    B, L, D, H, F_ = 8, 256, 768, 12, 3072
    # Of each full layer at least: its input, q, k, v, what attention and the norms gave, the hidden vectors, the bias.
    kept = 4 * 2 * (B * L * (7 * D + F_) + B * H * L * L)
    assert plain > 3 * weights + kept and saving < plain - kept / 3
    assert counted["bf16", False]["peak"] < plain


def test_rows_that_fit_are_on_the_safe_side():
    peaks = [memory.GB * n for n in (2, 3, 11, 100)]                     # at 1, 8, 64 and 512 rows
    assert [memory.fitting_rows(peaks, card) for card in (2, 8, 16, 200)] == ["0", "37", "81", "512+"]


def test_the_section_is_written_between_its_marks_and_the_rest_of_the_page_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PAGE", tmp_path / "page.md")
    page = "By hand.\n\n<!-- memory -->\n{}\n<!-- /memory -->\n\nBy hand.\n"
    memory.PAGE.write_text(page.format("old"))
    memory.write_page("\nnew\n")
    assert memory.PAGE.read_text() == page.format("new")
    memory.PAGE.write_text("By hand.\n")
    with pytest.raises(SystemExit, match="no place marked <!-- memory -->"):
        memory.write_page("new")


# --- everything that only a GPU can show

@pytest.mark.slow
def test_the_gpu_session_runs_on_a_cpu_too(tmp_path):
    """Keeps the GPU checks runnable without a GPU."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), str(tmp_path / "out"), "", "--small"],
                          capture_output=True, text=True, timeout=900, cwd=tmp_path, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "gpu.md").read_text().count("| ok |") == 9
    speed = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["what"] for row in speed["shapes"]] == ["forward", "training step"] and len(speed["fine_tuning"]) == 1
    assert all(contender["ms"] > 0 for row in speed["shapes"] for contender in row["times"].values())
    assert max(contender["difference"] for contender in speed["shapes"][0]["times"].values()) < 1e-5
    assert "| forward, 2 x 32, fp32 |" in (tmp_path / "out" / "speed.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.md", "speed.json", "speed.md"]
