"""Check that a change leaves every number of a training run the same: train at an old commit and here, and compare.

    python benchmarks/same_numbers.py fa198dc                     400 rows of the synthetic dataset, fp32 and bf16
    python benchmarks/same_numbers.py HEAD --rows autoj.csv --precision fp32
    python benchmarks/same_numbers.py HEAD --keep runs/same       keep the old checkout, the runs and their logs

The old commit is unpacked into a temporary folder. Its train.py and the present one, with uncommitted changes, then
train for two epochs on the same rows from the same encoder, with the same Python and number of threads, and with
options that every version of train.py has. `metrics.csv` and `model/model.safetensors` must be equal byte for byte.
Exit codes: 0 if they are; 1 if not, with a list of the columns and tensors that differ, or if a run fails, with its
log; 2 for wrong arguments. On a processor without bfloat16 units bf16 takes several times as long.
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402 - these need the path
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from minipref import synthetic  # noqa: E402

ENCODER = ROOT / "weights" / "minipref-tiny"
ROWS, THREADS = 400, 2
OPTIONS = ["--recipe", "tiny", "--epochs", "2", "--batch-size", "8", "--accumulate", "2", "--seed", "9",
           "--device", "cpu", "--limit", str(ROWS)]


# --- comparing --------------------------------------------------------------------------------------------------------

def compare_metrics(old: Path, new: Path) -> list[str]:
    """The differences of two metrics.csv, one line per column with its first step; [] for equal bytes."""
    if old.read_bytes() == new.read_bytes():
        return []
    before, after = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (old, new))
    found = []
    if list(before) != list(after):
        found.append(f"columns: {', '.join(before)}; now {', '.join(after)}")
    if len(before) != len(after):
        found.append(f"evaluations: {len(before)}, now {len(after)}")
    both = range(min(len(before), len(after)))
    for name in before.columns.intersection(after.columns, sort=False):
        row = next((row for row in both if before[name][row] != after[name][row]), None)
        if row is not None:
            step = f"step {before['step'][row]}" if "step" in before else f"row {row + 1}"
            found.append(f"column {name}, first at {step}: {before[name][row]}, now {after[name][row]}")
    return found or ["equal values in different bytes"]


def compare_tensors(old: Path, new: Path) -> list[str]:
    """The differences of two safetensors files, one line per tensor; [] for equal bytes."""
    if sha256(old) == sha256(new):
        return []
    before, after = load_file(old), load_file(new)
    found = [f"{name}: only in the old model" for name in before if name not in after]
    found += [f"{name}: only in the new model" for name in after if name not in before]
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name], after[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found.append(f"{name}: {a.dtype} {tuple(a.shape)}, now {b.dtype} {tuple(b.shape)}")
        elif not torch.equal(as_bytes(a), as_bytes(b)):
            differs = (as_bytes(a) != as_bytes(b)).reshape(a.numel(), -1).any(1).sum()
            largest = (a.double() - b.double()).abs().max()
            found.append(f"{name}: {differs:,} of {a.numel():,} values differ, the largest difference is {largest:.2e}")
    return found or [f"equal tensors in different files: SHA-256 {sha256(old)[:12]}, now {sha256(new)[:12]}"]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


COMPARED = {Path("metrics.csv"): compare_metrics, Path("model", "model.safetensors"): compare_tensors}


def compare_runs(old: Path, new: Path) -> dict[Path, list[str]]:
    """The differences of two runs' folders by file; [] for equal bytes."""
    return {file: compare(old / file, new / file) for file, compare in COMPARED.items()}


# --- training ---------------------------------------------------------------------------------------------------------

def unpack(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)


def train(checkout: Path, rows: Path, precision: str, run: Path) -> None:
    """Train with a checkout's train.py. Errors: SystemExit, with the log, if it fails."""
    command = [sys.executable, str(checkout / "train.py"), "--train", str(rows), "--encoder", str(ENCODER), "--run",
               str(run), "--precision", precision, *OPTIONS]
    log = run.with_suffix(".log")
    with open(log, "wb") as file:            # the working directory gets runs/latest
        done = subprocess.run(command, cwd=run.parent, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        print(f"{text}\nexit code {done.returncode}: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(1)


def environment() -> dict[str, str]:
    """This process's variables with a fixed number of threads, and without those that select another checkout or join a
    process group."""
    unset = ("PYTHONPATH", "PYTHONSAFEPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {name: value for name, value in os.environ.items() if name not in unset} | threads | {
        "OMP_WAIT_POLICY": "PASSIVE"}            # changes no numbers; leaves cores to other programs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", metavar="OLD_COMMIT")
    parser.add_argument("--rows", type=Path, metavar="CSV", help=f"labelled rows, of which the first {ROWS} are used "
                                                                 "(default: the synthetic dataset)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for the old checkout and the runs")
    options = parser.parse_args(arguments)
    if options.rows and not options.rows.is_file():
        parser.error(f"--rows {options.rows}: no such file")
    if options.keep and options.keep.exists():
        parser.error(f"--keep {options.keep}: it exists; expected a new folder")
    git = ["git", "rev-parse", "--verify", "--quiet", "--short", f"{options.commit}^{{commit}}"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not commit:
        parser.error(f"{options.commit}: no such commit")

    with contextlib.nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as kept:
        folder = Path(kept).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        unpack(commit, folder / "old")
        rows = options.rows or synthetic.write_dataset(folder / "rows", train_rows=ROWS, test_rows=1)["train"]
        equal = [compare_precision(precision, rows.resolve(), folder, commit) for precision in options.precision]
    print("every number is the same" if all(equal) else "NOT the same")
    return 0 if all(equal) else 1


def compare_precision(precision: str, rows: Path, folder: Path, commit: str) -> bool:
    """Train with both versions in one precision, print a line per file, and return whether all are equal."""
    old, new = folder / f"{precision}-old", folder / f"{precision}-new"
    train(folder / "old", rows, precision, old)
    train(ROOT, rows, precision, new)
    found = compare_runs(old, new)
    for file, differences in found.items():
        print(f"{precision}  {file}: " + ("differs" if differences else
              f"equal to {commit}, SHA-256 {sha256(new / file)[:12]}"), flush=True)
        for line in differences:
            print(f"      {line}", flush=True)
    return not any(found.values())


if __name__ == "__main__":
    sys.exit(main())
