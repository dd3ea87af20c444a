"""Prediction with int8 products on a CPU: what dynamic quantisation of the linear layers gains, and what it costs.

    python benchmarks/int8.py --model DIR --rows CSV     writes benchmarks/int8.json; then `make docs`

Two forms beside float32, both with int8 weights that have a scale for each output:
- *by hand*: activations have a scale for each token; products by `torch._int_mm`;
- *torch*: `torch.ao.quantization.quantize_dynamic`, with one scale for all activations of a call (FBGEMM).

Times are those of v3-small with random weights on 8 rows of 512 tokens, medians. Log loss and winners are those
of the trained model in DIR on labelled rows; there the products by hand are computed on the same integers in float32,
because `torch._int_mm` takes minutes on a CPU without int8 instructions.
"""

import argparse
import copy
import statistics
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402
from bench import machine  # noqa: E402
from peers import take_turns  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from minipref.config import EncoderConfig  # noqa: E402
from minipref.data import read_pairs  # noqa: E402
from minipref.fast import accelerate  # noqa: E402
from minipref.metrics import evaluate  # noqa: E402
from minipref.model import PreferenceModel  # noqa: E402
from minipref.predictor import load_judge  # noqa: E402
from minipref.runtime import write_json  # noqa: E402

FIGURES = ROOT / "benchmarks" / "int8.json"
FLOAT, HAND, TORCH = "float32", "int8 by hand", "int8 by torch"


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and activations and a float32 result. Shapes: (..., I) -> (..., O)."""

    in_float32 = False

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1) / 127                                 # (O,)
        self.weight = (linear.weight / self.scale[:, None]).round().to(torch.int8).T.contiguous()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127                # (rows, 1)
        whole = (rows / scale).round_()
        product = whole @ self.weight.float() if self.in_float32 else torch._int_mm(whole.to(torch.int8), self.weight)
        return product.float().mul_(scale).mul_(self.scale).add_(self.bias).view(*x.shape[:-1], -1)


def quantised(model: nn.Module, form: str) -> nn.Module:
    """A copy of the model with its linear layers quantised."""
    model = copy.deepcopy(model)
    if form == TORCH:
        config = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(model, config, inplace=True)
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is nn.Linear and form == HAND:
                setattr(module, name, Int8Linear(part))
    return model


@torch.inference_mode()
def seconds(runs: int, rows: int, length: int) -> dict[str, dict[str, list[float]]]:
    """Times of one product of the feed-forward, and of the whole model."""
    config = EncoderConfig()
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(config.hidden_size, config.intermediate_size))
    x = torch.randn(rows * length, config.hidden_size)
    model = accelerate(PreferenceModel(config)).eval()
    ids = torch.randint(5, 1000, (rows, length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    layers = {form: quantised(linear, form) for form in (FLOAT, HAND, TORCH)}
    models = {form: quantised(model, form) for form in (FLOAT, TORCH)}       # not by hand: too slow
    return {f"{rows * length:,} x {config.hidden_size} by {config.hidden_size} x {config.intermediate_size}":
                take_turns({form: lambda layer=layer: layer(x) for form, layer in layers.items()}, runs),
            f"v3-small, {rows} x {length} tokens":
                take_turns({form: lambda m=m: m(ids, mask) for form, m in models.items()}, runs)}


@torch.inference_mode()
def scores(folder: Path, rows: Path) -> dict[str, dict[str, float]]:
    """Log loss of each form on labelled rows, and the share of rows with float32's winner."""
    pairs = read_pairs(rows)
    texts = [(pair.prompt, pair.response_a, pair.response_b) for pair in pairs]
    labels, found = np.array([pair.label for pair in pairs]), {}
    Int8Linear.in_float32 = True
    for form in (FLOAT, HAND, TORCH):
        judge = load_judge(folder)
        judge.model = quantised(judge.model, form)
        found[form] = np.asarray(judge.compare_many(texts))
    Int8Linear.in_float32 = False
    return {form: {"rows": len(labels), "log_loss": evaluate(p, labels)["log_loss"],
                   "same_winner": float((p.argmax(1) == found[FLOAT].argmax(1)).mean())} for form, p in found.items()}


def table(figures: dict) -> str:
    """Speed-up over float32, log loss and winners of each form."""
    lines = [f"| | {FLOAT} | {HAND} | {TORCH} |", "|---|---:|---:|---:|"]
    for what, times in figures["seconds"].items():
        middle = {form: statistics.median(values) for form, values in times.items()}
        cells = [f"{middle[FLOAT] / middle[form]:.2f}" if form in middle else "" for form in (FLOAT, HAND, TORCH)]
        lines.append(f"| {what}: times as fast | {' | '.join(cells)} |")
    results = figures["scores"]
    lines.append("| log loss | " + " | ".join(f"{results[form]['log_loss']:.4f}" for form in results) + " |")
    lines.append("| rows with float32's winner | " + " | ".join(
        f"{results[form]['same_winner']:.1%}" for form in results) + " |")
    found = figures["machine"]
    return "\n".join([*lines, "", f"{found['cores']} cores of {found['cpu']} ({found['instructions']}), torch "
                      f"{found['torch']}; scores of `make train`'s model on {results[FLOAT]['rows']:,} synthetic "
                      "rows. `python benchmarks/int8.py --runs 3 --model runs/NAME/model --rows "
                      "data/synthetic/test_labelled.csv`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a trained model")
    parser.add_argument("--rows", type=Path, required=True, metavar="CSV", help="labelled rows")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="JSON")
    parser.add_argument("--device", default="cpu", choices=("cpu",))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.ao")
    figures = {"machine": machine(options), "scores": scores(options.model, options.rows),
               "seconds": seconds(options.runs, 8, 512)}
    write_json(options.figures, figures)
    print(table(figures))


if __name__ == "__main__":
    main()
