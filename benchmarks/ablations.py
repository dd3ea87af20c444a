"""Fine-tuning with and without each of its parts: one training run a line, on the bundled task.

    python benchmarks/ablations.py                          every line, one seed; as long as eight `make train`
    python benchmarks/ablations.py --seeds 1 2 3            means of three seeds
    python benchmarks/ablations.py --only base no-swap -- --limit 12000     some lines, with further options of train.py

What follows `--` is for all lines, and wins over a line's own options.
On a machine without bfloat16 units the line `bf16` has their rounding and not their speed (`RoundedProducts`).
Runs that are finished already are not run again: their folders in runs/ablations hold their reports. The table goes to
the terminal, in Markdown.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - these need the path
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train  # noqa: E402
from minipref.runtime import choose_device, choose_precision  # noqa: E402

FOLDER = Path("runs/ablations")
VARIANTS = {  # name: (what is different, options of train.py)
    "base": ("nothing: the recipe `tiny` with the command's options", []),
    "no-auxiliary-head": ("[CLS] learns from the labels alone", ["--aux-loss", "0"]),
    "no-swap": ("A and B are never exchanged in training", ["--no-swap"]),
    "no-warmup": ("the learning rate starts at its peak", ["--warmup", "0"]),
    "no-decay": ("no weight decay", ["--weight-decay", "0"]),
    "frozen-words": ("the word embeddings stay as pretrained", ["--freeze-embeddings"]),
    "fp32": ("no mixed precision", ["--precision", "fp32"]),
    "bf16": ("mixed precision", ["--precision", "bf16"]),
    "few-rows": ("2,000 rows, six times", ["--limit", "2000", "--epochs", "6"]),
    "few-rows-no-stopping": ("2,000 rows, six times, all of it",
                             ["--limit", "2000", "--epochs", "6", "--patience", "0"]),
}
aten = torch.ops.aten
PRODUCTS = {aten.mm: aten.mm, aten.addmm: aten.addmm, aten.bmm: aten.bmm, aten.baddbmm: aten.baddbmm,
            aten.baddbmm_: aten.baddbmm}                                             # each: the same, not in place
WAYS = {"model, one order": "one order", "model, both orders": "both orders", "model, calibrated": "and a temperature"}


class RoundedProducts(TorchDispatchMode):
    """Products of bfloat16 as processors with units for them compute them, on those that have none: added in float32,
    rounded once. The product of two bfloat16 is exact in float32, so no more than the order of a sum can differ. torch
    itself gives the same numbers there, at a tenth to a hundredth of the speed."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        product = PRODUCTS.get(op.overloadpacket)
        if product is None or args[0].dtype != torch.bfloat16:
            return op(*args, **kwargs)
        into = args[0] if op.overloadpacket is aten.baddbmm_ else kwargs.pop("out", None)
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        result = product(*wide, **kwargs).to(torch.bfloat16)
        return result if into is None else into.copy_(result)


def circumstances(name: str) -> contextlib.AbstractContextManager:
    """What no option of train.py changes."""
    without_units = choose_precision("auto", choose_device("auto")) == "fp32"
    return RoundedProducts() if name == "bf16" and without_units else contextlib.nullcontext()


def report_of(name: str, seed: int, more: list[str]) -> dict:
    """The report of a variant's run, trained first where there is none. Errors: SystemExit if training fails."""
    run = FOLDER / "-".join([name, str(seed), *(Path(part).name.lstrip("-") for part in more)])
    if not (run / "report.json").is_file():
        resume = ["--resume"] if (run / "state").is_dir() else [*VARIANTS[name][1], *more, "--seed", str(seed)]
        with circumstances(name):
            code = train.main(["--run", str(run), *resume])
        if code:
            raise SystemExit(code)
    evaluations = pd.read_csv(run / "metrics.csv")
    return json.loads((run / "report.json").read_text(encoding="utf-8")) | {"last": evaluations["log_loss"].iloc[-1]}


def table(reports: dict[str, list[dict]]) -> str:
    """A line a variant: log loss of the last model in one order, of the one that was kept in each way of predicting,
    its accuracy, and minutes; means over the seeds."""
    seeds = max(map(len, reports.values()))
    lines = [f"| run | what is different | last model | {' | '.join(WAYS.values())} | accuracy | minutes |",
             "|---|---|" + "---:|" * (len(WAYS) + 3)]
    for name, found in reports.items():
        figures = [f"{np.mean([r['last'] for r in found]):.4f}"]
        figures += [f"{np.mean([r['results'][way]['log_loss'] for r in found]):.4f}" for way in WAYS]
        figures.append(f"{np.mean([r['results']['model, calibrated']['accuracy'] for r in found]):.3f}")
        figures.append(f"{np.mean([r['minutes'] for r in found]):.0f}")
        lines.append(f"| {name} | {VARIANTS[name][0]} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", f"Validation log loss, lower is better; means of {seeds} seed{'s' * (seeds > 1)}."])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours, more = arguments[:end], arguments[end + 1:]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args(ours)
    reports = {name: [report_of(name, seed, more) for seed in options.seeds] for name in options.only}
    print(f"\n{table(reports)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
