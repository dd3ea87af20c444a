"""Checks that need a GPU, about five minutes: training, prediction, comparison with transformers.

    python benchmarks/gpu_check.py                           on the first GPU; writes docs/gpu.md
    python benchmarks/gpu_check.py --device cpu --small      the same checks on a CPU, as in the tests

Each check is a line of the report, `ok` or `FAILED` with its numbers; the exit code is 1 if any failed. The checks:
values and gradients against transformers, training in each precision (autocast, GradScaler), predictions against the
CPU's, memory of a step against benchmarks/memory.py, time of a step against transformers, several processes (NCCL).
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402 - these need the path
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from helpers import (  # noqa: E402
    NO_DROPOUT,
    gradients_by_reference_name,
    large_model,
    padded_batch,
    reference_model,
    relative,
    resized,
    worst_gradient,
)
from memory import GB, SIZES, markdown, step_bytes  # noqa: E402
from small import BUNDLED, write_encoder, write_rows  # noqa: E402

from minipref.config import EncoderConfig  # noqa: E402
from minipref.fast import accelerate  # noqa: E402
from minipref.model import PreferenceModel  # noqa: E402
from minipref.optim import AdamW, decay_groups  # noqa: E402
from minipref.runtime import autocast, write_text  # noqa: E402
from minipref.synthetic import write_dataset  # noqa: E402

REPORT = ROOT / "docs" / "gpu.md"
PRECISIONS = ("fp32", "bf16", "fp16")


class Check:
    """One line of the report: the check, whether it held, and its numbers."""

    def __init__(self, name: str, held: bool, figures: str):
        self.name, self.held, self.figures = name, held, figures
        print(f"{'ok' if held else 'FAILED':<8}{name}: {figures}", flush=True)


# --- values and gradients ---------------------------------------------------------------------------------------------

def compare(device: torch.device, config: EncoderConfig, length: int) -> list[Check]:
    """Logits and gradients against transformers on the same device, in each precision."""
    model = accelerate(large_model(config)).to(device)
    reference = reference_model(model).to(device)
    ids, attention_mask = (t.to(device) for t in padded_batch(config, [length, length - 20]))
    labels = torch.tensor([0, 2], device=device)
    theirs = {precision: outcome(reference, lambda: reference(ids, attention_mask=attention_mask.long()).logits, labels,
                                 precision) for precision in PRECISIONS}
    checks = []
    for precision in PRECISIONS:
        logits, gradients = outcome(model, lambda: model(ids, attention_mask), labels, precision)
        if precision == "fp32":
            value, (gradient, name) = relative(logits, theirs["fp32"][0]), worst_gradient(gradients, theirs["fp32"][1])
            checks.append(Check("values and gradients match transformers, fp32", value < 1e-4 and gradient < 2e-3,
                                f"logits {value:.1e}, worst gradient {gradient:.1e} ({name})"))
        else:
            ours, their = (relative(found.float(), theirs["fp32"][0]) for found in (logits, theirs[precision][0]))
            checks.append(Check(f"{precision}: at most twice transformers' error against fp32",
                                ours < 2 * their + 0.01, f"logits {ours:.1e}, transformers {their:.1e}"))
    return checks


def outcome(model: torch.nn.Module, forward: Callable, labels: torch.Tensor, precision: str) -> tuple:
    model.zero_grad()
    with autocast(labels.device, precision):
        logits = forward()
    F.cross_entropy(logits.float(), labels).backward()
    gradients = gradients_by_reference_name(model) if isinstance(model, PreferenceModel) else {
        name: p.grad for name, p in model.named_parameters()}
    return logits.detach(), {name: g.clone() for name, g in gradients.items()}


# --- the programs -----------------------------------------------------------------------------------------------------

def run(*command: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def log_loss(printed: str) -> float:
    return float(re.search(r"model, both orders\s+(\d\.\d+)", printed)[1])


def train_and_predict(device: str, folder: Path, small: bool) -> list[Check]:
    """train.py in each precision on rows with a simple rule, then predict.py on the device and on the CPU."""
    rows = write_rows(folder / "rows.csv", 150 if small else 600)
    test = write_rows(folder / "test.csv", 60, seed=1, labels=False)
    encoder = write_encoder(folder / "encoder", dropout=0.0)
    checks = []
    for precision in PRECISIONS:
        started = time.monotonic()
        printed = run(str(ROOT / "train.py"), "--train", str(rows), "--encoder", str(encoder), "--run", precision,
                      "--recipe", "tiny", "--epochs", "6", "--lr", "3e-3", "--batch-size", "8", "--patience", "0",
                      "--device", device, "--precision", precision, folder=folder)
        checks.append(Check(f"train.py learns, {precision}", log_loss(printed) < 0.6,
                            f"log loss {log_loss(printed):.4f} (prior about 1.06), {time.monotonic() - started:.0f} s"))
    found = {}
    for place in {device, "cpu"}:
        run(str(ROOT / "predict.py"), str(test), "--model", "fp32/model", "--device", place, "--precision", "fp32",
            "--output", f"{place}.csv", folder=folder)
        found[place] = pd.read_csv(folder / f"{place}.csv").iloc[:, 1:].to_numpy()
    difference = float(np.abs(found[device] - found["cpu"]).max())
    checks.append(Check(f"predict.py on {device} gives the CPU's probabilities", difference < 1e-3,
                        f"largest difference of 60 x 3 probabilities {difference:.1e}"))
    if not small:
        write_dataset(folder / "sample")
        started = time.monotonic()
        printed = run(str(ROOT / "train.py"), "--train", str(folder / "sample" / "train.csv"), "--encoder",
                      str(BUNDLED), "--run", "sample", "--recipe", "tiny", "--device", device, folder=folder)
        checks.append(Check("`make train`, precision auto", log_loss(printed) < 1.05,
                            f"log loss {log_loss(printed):.4f}, {time.monotonic() - started:.0f} s"))
    return checks


def several_processes(device: str, folder: Path) -> list[Check]:
    """The same run with two processes and with one: NCCL if there are two GPUs, else gloo."""
    base = ["--train", "rows.csv", "--encoder", "encoder", "--recipe", "tiny", "--epochs", "2", "--lr", "1e-3",
            "--head-dropout", "0", "--precision", "fp32"]
    if device == "cuda" and torch.cuda.device_count() < 2:
        device = "cpu"
    base += ["--device", device]
    one = log_loss(run(str(ROOT / "train.py"), *base, "--run", "alone", folder=folder))
    two = log_loss(run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
                       str(ROOT / "train.py"), *base, "--run", "together", folder=folder))
    return [Check(f"two processes match one, {'NCCL' if device == 'cuda' else 'gloo (no two GPUs)'}",
                  abs(one - two) < 2e-3, f"log loss {one:.4f} and {two:.4f}")]


# --- time and memory --------------------------------------------------------------------------------------------------

def step_of(model: torch.nn.Module, forward: Callable, labels: torch.Tensor, precision: str) -> Callable[[], None]:
    optimizer = AdamW(decay_groups(model.train(), 0.01), lr=1e-5)
    scaler = torch.amp.GradScaler(labels.device.type, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(labels.device, precision):
            logits = forward()
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


def seconds_and_peak(step: Callable[[], None], device: torch.device, steps: int) -> tuple[float, int]:
    """Seconds per step without the first, and the peak of allocated bytes (0 on a CPU)."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return (time.monotonic() - started) / steps, peak


def time_and_memory(device: torch.device, config: EncoderConfig, rows: int, length: int, steps: int) -> list[Check]:
    """Time of a training step against transformers, and peak memory against the computed value."""
    checks = []
    ids, attention_mask = (t.to(device) for t in padded_batch(config, [length] * rows))
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    for precision in PRECISIONS if device.type == "cuda" else PRECISIONS[:1]:
        model = accelerate(PreferenceModel(config)).to(device)
        reference = reference_model(model).to("cpu")
        ours, peak = seconds_and_peak(step_of(model, lambda m=model: m(ids, attention_mask), labels, precision), device,
                                      steps)
        del model
        reference = reference.to(device)
        theirs, their_peak = seconds_and_peak(
            step_of(reference, lambda m=reference: m(ids, attention_mask=attention_mask.long()).logits, labels,
                    precision), device, steps)
        del reference
        in_time = device.type == "cpu" or ours < 1.5 * theirs        # times on a shared CPU are not checked
        checks.append(Check(f"a step of {rows} x {length} tokens, {precision}", in_time,
                            f"{1000 * ours:.0f} ms, transformers {1000 * theirs:.0f} ms"))
        if device.type == "cuda":
            computed = step_bytes(config, rows, length, precision, checkpoint=False)["peak"]
            checks.append(Check(f"its memory, {precision}", 0.7 < peak / computed < 1.3,
                                f"{peak / GB:.2f} GB, computed {computed / GB:.2f}, transformers "
                                f"{their_peak / GB:.2f}"))
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes and few rows; a minute on a CPU")
    parser.add_argument("--output", type=Path, default=REPORT)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine, or this build of torch, has no CUDA; --device cpu --small runs the same checks")
    device = torch.device(options.device)
    processor = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if options.device == "cuda" else "CPU"
    machine = (f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
               f"{transformers.__version__}, {processor}")
    print(machine)

    torch.manual_seed(0)
    config = resized(SIZES["v3-small"], vocab_size=1000, **NO_DROPOUT)
    if options.small:
        config = resized(config, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128)
    checks = compare(device, config, 150 if options.small else 300)
    with tempfile.TemporaryDirectory() as folder:
        checks += train_and_predict(options.device, Path(folder), options.small)
        checks += several_processes(options.device, Path(folder))
    shape = config if options.small else SIZES["v3-small"]
    checks += time_and_memory(device, shape, 2 if options.small else 8, 128 if options.small else 512,
                              2 if options.small else 10)
    table = [["check", "", "figures"], ["---"] * 3]
    table += [[check.name, "ok" if check.held else "FAILED", check.figures] for check in checks]
    write_text(options.output, f"# GPU check\n\nWritten by `python benchmarks/gpu_check.py` ({machine}).\n\n"
                               f"{markdown(table)}\n")
    print(f"wrote {options.output}")
    return 0 if all(check.held for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
