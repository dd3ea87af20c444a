"""Ablations of fine-tuning on the synthetic dataset: one training run per variant.

    python benchmarks/ablations.py                          all variants, one seed; as long as eight `make train`
    python benchmarks/ablations.py --seeds 1 2 3            means of three seeds
    python benchmarks/ablations.py --only base no-swap -- --limit 12000     some variants, with more options of train.py

Options after `--` apply to all variants and override their own. Finished runs in runs/ablations are not repeated. The
table is printed as Markdown. On a machine without bfloat16 units the variant `bf16` has their rounding but not their
speed (`RoundedProducts`).
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
VARIANTS = {  # name: (difference, options of train.py)
    "base": ("nothing: the recipe `tiny` with the command's options", []),
    "no-auxiliary-head": ("[CLS] learns from the labels alone", ["--aux-loss", "0"]),
    "no-swap": ("A and B are never exchanged in training", ["--no-swap"]),
    "no-warmup": ("the learning rate starts at its peak", ["--warmup", "0"]),
    "no-decay": ("no weight decay", ["--weight-decay", "0"]),
    "frozen-words": ("the word embeddings stay as pretrained", ["--freeze-embeddings"]),
    "fp32": ("no mixed precision", ["--precision", "fp32"]),
    "bf16": ("mixed precision", ["--precision", "bf16"]),
    "few-rows": ("2,000 rows, six epochs", ["--limit", "2000", "--epochs", "6"]),
    "few-rows-no-stopping": ("2,000 rows, six epochs, no early stopping",
                             ["--limit", "2000", "--epochs", "6", "--patience", "0"]),
}
aten = torch.ops.aten
PRODUCTS = {aten.mm: aten.mm, aten.addmm: aten.addmm, aten.bmm: aten.bmm, aten.baddbmm: aten.baddbmm,
            aten.baddbmm_: aten.baddbmm}                                             # each: the out-of-place form
WAYS = {"model, one order": "one order", "model, both orders": "both orders", "model, calibrated": "and a temperature"}


class RoundedProducts(TorchDispatchMode):
    """Emulates bfloat16 products on processors without bfloat16 units: sums in float32, one rounding at the end.

    The product of two bfloat16 numbers is exact in float32, so only the order of summation can differ. torch gives the
    same numbers on such processors, at a tenth to a hundredth of the speed.
    """

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
    """The context in which a variant is trained."""
    without_units = choose_precision("auto", choose_device("auto")) == "fp32"
    return RoundedProducts() if name == "bf16" and without_units else contextlib.nullcontext()


def report_of(name: str, seed: int, more: list[str]) -> dict:
    """The report of a variant's run, which is trained if needed. Errors: SystemExit if training fails."""
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
    """One line per variant, with means over the seeds: log loss of the last model in one order, log loss of the best
    model in each way of predicting, its accuracy, and minutes."""
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
