"""What encoders know of a task before any of their weights is trained on it: a table for docs/experiments.md.

    python benchmarks/frozen.py --train autoj.csv                               weights/minipref-tiny, 512 tokens
    python benchmarks/frozen.py --train s/train.csv --limit 6000 --encoders bundled random mlm=runs/mlm/model
    python benchmarks/frozen.py --train autoj.csv --lengths 512 512-marked 1024

A row is read once, and a softmax regression judges it by the mean vector of answer A minus that of answer B, after each
of the last two layers; beside it, the same together with what `length only` counts. `random` has the architecture of
the bundled encoder and weights drawn anew for each seed. A seed decides the split by prompt (`split_by_prompt`). The
regression's penalty is chosen on a fifth of the training rows. `512-marked` is 512 with `marked_cuts`.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402
from experiments import BUNDLED, fresh_encoder  # noqa: E402

from minipref import data, load_encoder, load_tokenizer, metrics  # noqa: E402
from minipref.classifier import field_of_tokens  # noqa: E402
from minipref.data import Pair, character_counts, encode_pairs, make_batch, read_pairs, split_by_prompt  # noqa: E402
from minipref.encoder import Encoder  # noqa: E402
from minipref.tokenizer import Tokenizer  # noqa: E402

LENGTHS = ("256", "512", "512-marked", "1024")
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
BATCH = 16


@contextlib.contextmanager
def marked_cuts(tokenizer: Tokenizer) -> Iterator[None]:
    """While it lasts, a field over its budget has `[... 123 tokens ...]` between its head and its tail, within the
    budget: length is the strongest single signal of real rows, and cutting hides it."""
    plain = data.head_and_tail

    def with_marker(ids: list[int], budget: int) -> list[int]:
        marker = tokenizer.encode(f"[... {len(ids) - budget} tokens ...]") if len(ids) > budget else []
        if budget < 4 * len(marker):                                    # it would leave too little of the field
            return plain(ids, budget)
        kept = plain(ids, budget - len(marker))
        head = (len(kept) + 1) // 2
        return kept[:head] + marker + kept[head:]

    with mock.patch.object(data, "head_and_tail", with_marker):
        yield


@torch.no_grad()
def answer_means(encoder: Encoder, tokenizer: Tokenizer, pairs: Sequence[Pair], max_length: int) -> np.ndarray:
    """The mean vectors of both answers in the embeddings and after each layer. Shapes: -> (rows, N + 1, 2, D)."""
    examples = encode_pairs(pairs, tokenizer, max_length)
    by_length = np.argsort(examples.lengths, kind="stable")
    means = np.empty((len(pairs), encoder.config.layers + 1, 2, encoder.config.width), dtype=np.float32)
    for begin in range(0, len(pairs), BATCH):
        rows = by_length[begin:begin + BATCH]
        ids, is_token, _ = make_batch(examples, rows, [False] * len(rows), tokenizer)
        field = field_of_tokens(ids, tokenizer.sep_id)[:, None]                          # (B, 1, L)
        is_in = (field == torch.tensor([1, 2])[:, None]).float()                         # (B, 2, L): of A, of B
        for layer, x in enumerate(encoder.layer_outputs(ids, is_token)):
            means[rows, layer] = (is_in @ x / is_in.sum(-1, keepdim=True)).numpy()
    return means


def regression(x: np.ndarray, labels: np.ndarray, prompts: list, seed: int):
    """`metrics.logistic_regression` with the best of `PENALTIES` on a fifth of these rows, then fitted on all."""
    held_out = split_by_prompt(prompts, labels, (0.8, 0.2), seed) == 1

    def loss(penalty: float) -> float:
        fitted = metrics.logistic_regression(x[~held_out], labels[~held_out], penalty)
        return metrics.evaluate(fitted(x[held_out]), labels[held_out])["log_loss"]

    return metrics.logistic_regression(x, labels, min(PENALTIES, key=loss))


def judged(features: np.ndarray, pairs: list[Pair], valid_fraction: float, seed: int) -> dict:
    """`metrics.evaluate` of the regression on these features, on the split's validation rows. Shapes: (rows, K)."""
    prompts, labels = [pair.prompt for pair in pairs], np.array([pair.label for pair in pairs])
    is_valid = split_by_prompt(prompts, labels, (1 - valid_fraction, valid_fraction), seed) == 1
    of_training = [prompt for prompt, held_out in zip(prompts, is_valid) if not held_out]
    fitted = regression(features[~is_valid], labels[~is_valid], of_training, seed)
    return metrics.evaluate(fitted(features[is_valid]), labels[is_valid])


def last_differences(folder: str | Path, pairs: list[Pair], length: str) -> np.ndarray:
    """A minus B after the last two layers. Shapes: -> (rows, 2 D)."""
    encoder, tokenizer = load_encoder(folder).eval(), load_tokenizer(folder)
    with marked_cuts(tokenizer) if length.endswith("-marked") else contextlib.nullcontext():
        means = answer_means(encoder, tokenizer, pairs, int(length.removesuffix("-marked")))
    return (means[:, -2:, 0] - means[:, -2:, 1]).reshape(len(pairs), -1).astype(np.float64)


def differences_of(name: str, folder: str, pairs: list[Pair], length: str, seeds: list[int]) -> list[np.ndarray]:
    """`last_differences` for each seed: they differ for `random` alone, whose weights the seed decides."""
    if name != "random":
        return [last_differences(folder or BUNDLED, pairs, length)] * len(seeds)
    with tempfile.TemporaryDirectory() as scratch:
        return [last_differences(fresh_encoder(BUNDLED, Path(scratch) / str(seed), seed), pairs, length)
                for seed in seeds]


def line(cells: list[str], *ways: list[dict]) -> str:
    for found in ways:
        losses = [result["log_loss"] for result in found]
        cells = [*cells, f"{statistics.mean(losses):.4f}", ", ".join(f"{loss:.4f}" for loss in losses),
                 f"{statistics.mean(result['accuracy'] for result in found):.3f}"]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="CSV")
    add("--limit", type=int, metavar="N", help="the first N rows alone")
    add("--valid-fraction", type=float, default=0.2, help="share of the rows that validate")
    add("--encoders", nargs="+", default=["bundled"], metavar="NAME[=DIR]", help="bundled, random, or another by name")
    add("--lengths", nargs="+", default=["512"], choices=LENGTHS, help="tokens of a row")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args(arguments)
    pairs = [pair for path in options.train for pair in read_pairs(path)][:options.limit]
    lengths = metrics.length_features(character_counts(pairs))

    def of(features: list[np.ndarray]) -> list[dict]:
        return [judged(x, pairs, options.valid_fraction, seed) for x, seed in zip(features, options.seeds)]

    print("| encoder | tokens | log loss | per seed | accuracy | with lengths | per seed | accuracy |\n"
          "|---|---:|---:|---|---:|---:|---|---:|")
    nothing = of([np.zeros((len(pairs), 1))] * len(options.seeds))                       # class prior
    print(line(["none", ""], nothing, of([lengths] * len(options.seeds))), flush=True)
    for encoder in options.encoders:
        name, _, folder = encoder.partition("=")
        for length in options.lengths:
            found = differences_of(name, folder, pairs, length, options.seeds)
            both = [np.column_stack([x, lengths]) for x in found]
            print(line([name, length], of(found), of(both)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
