"""Compare minipref with transformers, layer by layer: the largest difference of values and gradients.

    make parity                                     or python benchmarks/parity.py; a few minutes
    python benchmarks/parity.py --lengths 17 300    only these lengths

The models are a random v3-small, with weights so large that a wrong sign gives a difference of order 1, and the
published weights if weights/deberta-v3-small holds them. The comparison is that of tests/test_parity.py, at the real
tokens of padded batches. Each number is the largest difference divided by the largest entry of the reference's
tensor; for a gradient, by that or by a thousandth of the model's largest gradient, whichever is larger. The tables are
printed and written to benchmarks/parity.md; `make docs` puts the worst figures into README.md and docs/benchmarks.md.
"""

import argparse
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 - these need the path
import transformers  # noqa: E402
from helpers import (  # noqa: E402
    NO_DROPOUT,
    Outcome,
    large_model,
    our_outcome,
    padded_batch,
    reference_scale_in_float64,
    relative,
    their_outcome,
    worst_gradient,
)

from minipref.checkpoint import load_classifier  # noqa: E402
from minipref.config import EncoderConfig  # noqa: E402
from minipref.fast import accelerate  # noqa: E402
from minipref.model import PreferenceModel  # noqa: E402
from minipref.runtime import write_text  # noqa: E402

PUBLISHED = ROOT / "weights" / "deberta-v3-small"
REPORT = ROOT / "benchmarks" / "parity.md"
LENGTHS = [17, 132, 300, 512]


@dataclass
class Column:
    """One comparison: a column of a table."""

    title: str
    layers: list[float]                   # embeddings and every layer's output
    logits: float
    loss_gradient: tuple[float, str]      # the worst of all parameters, and its name
    all_gradient: tuple[float, str]


def compared(title: str, found: Outcome, wanted: Outcome, attention_mask: torch.Tensor) -> Column:
    return Column(title, [relative(f[attention_mask], w[attention_mask]) for f, w in zip(found.layers, wanted.layers)],
                  relative(found.logits, wanted.logits), worst_gradient(found.loss_gradients, wanted.loss_gradients),
                  worst_gradient(found.all_gradients, wanted.all_gradients))


def columns(model: PreferenceModel, length: int) -> list[Column]:
    """The comparisons of a model at one length: float32, and float64 as the reference for rounding."""
    ids, attention_mask = padded_batch(model.config, [length, max(1, length - 20)])
    arguments = ids, attention_mask, torch.tensor([0, 2])
    accelerate(model)                    # as in train.py and predict.py; the tests also compare the plain model
    ours, theirs = our_outcome(model, *arguments), their_outcome(model, *arguments)
    exact_model = accelerate(PreferenceModel(model.config)).double().eval()
    exact_model.load_state_dict(model.state_dict())
    ours_exact = our_outcome(exact_model, *arguments)
    with reference_scale_in_float64():
        theirs_exact = their_outcome(exact_model, *arguments)
    return [compared(f"L {length}, float32", ours, theirs, attention_mask),
            compared(f"L {length}, float64", ours_exact, theirs_exact, attention_mask),
            compared(f"L {length}, minipref's rounding", ours, ours_exact, attention_mask),
            compared(f"L {length}, transformers' rounding", theirs, theirs_exact, attention_mask)]


def table(found: list[Column]) -> str:
    """A Markdown table with a row for each layer."""
    names = ["embeddings", *(f"layer {n}" for n in range(1, len(found[0].layers))), "logits",
             "worst gradient of the loss", "worst gradient of all layers' outputs"]
    rows = [["", *(column.title for column in found)], ["---"] + ["---:"] * len(found)]
    for i, name in enumerate(names):
        figures = [[*c.layers, c.logits, c.loss_gradient[0], c.all_gradient[0]][i] for c in found]
        rows.append([name, *(f"{figure:.1e}" if figure else "0" for figure in figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def section(title: str, said: str, model: PreferenceModel, lengths: list[int]) -> str:
    """The section of the report on one model, printed during the comparison."""
    print(f"\n{title}", flush=True)
    found = []
    for length in lengths:
        start = time.monotonic()
        found.append(columns(model, length))
        print(f"\n{table(found[-1])}\n({time.monotonic() - start:.0f} s)", flush=True)
    kinds = ["minipref against transformers, float32", "minipref against transformers, float64",
             "minipref's float32 against its own float64", "transformers' float32 against its own float64"]
    parts = [f"## {title}\n\n{said}"]
    for kind, chosen in zip(kinds, zip(*found)):
        chosen = [Column(f"L {length}", c.layers, c.logits, c.loss_gradient, c.all_gradient)
                  for length, c in zip(lengths, chosen)]
        worst = max(chosen, key=lambda c: max(c.loss_gradient[0], c.all_gradient[0]))
        name = max(worst.loss_gradient, worst.all_gradient)[1]
        parts.append(f"### {kind}\n\n{table(chosen)}\n\nThe worst gradient is that of `{name}`, at {worst.title}.")
    return "\n\n".join(parts)


def random_v3_small() -> PreferenceModel:
    return large_model(EncoderConfig(**NO_DROPOUT), seed=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="L")
    parser.add_argument("--output", type=Path, default=REPORT)
    options = parser.parse_args()
    machine = (f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
               f"{transformers.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    print(machine)
    sections = [section("A random v3-small", "Weights N(0, 1.6 / sqrt(768)), LayerNorms near 1; 141,897,219 in all.",
                        random_v3_small(), options.lengths)]
    if (PUBLISHED / "model.safetensors").is_file():
        torch.manual_seed(0)
        sections.append(section("The published weights", "microsoft/deberta-v3-small, with a fresh pooler and head.",
                                load_classifier(PUBLISHED), options.lengths))
    else:
        sections.append("## The published weights\n\nNot compared in this report: they were not in "
                        "`weights/deberta-v3-small` when it was made. `make weights parity` does it.")
        print(f"\nno published weights in {PUBLISHED.relative_to(ROOT)} (make weights): not compared")
    write_text(options.output, INTRODUCTION.format(machine=machine) + "\n\n".join(sections) + "\n")
    print(f"\nwrote {options.output}")
    return 0


INTRODUCTION = """# Parity with transformers, layer by layer

Written by `make parity` ({machine}). docs/benchmarks.md has the summary.

Each figure is the largest difference at real tokens, divided by the largest entry of the reference's tensor; a
gradient's by that entry, or by a thousandth of the model's largest gradient if that is larger. Batches are two rows of
L and L - 20 tokens. The loss is the classifier's; 'all layers' outputs' is a random projection of every layer's output,
so that every parameter of the encoder has a gradient. Dropout is off.

"""


if __name__ == "__main__":
    sys.exit(main())
