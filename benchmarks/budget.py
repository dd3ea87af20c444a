"""How long `make train` has to take on this machine's processor: the arithmetic of its matrix products, and the rate at
which they run here, in the precision that train.py chooses.

    python benchmarks/budget.py                     one thread, then as many as torch takes by itself
    python benchmarks/budget.py --precision fp32    float32, also where there are bfloat16 units
    OMP_NUM_THREADS=1 python benchmarks/budget.py   one thread only

Wants a machine that has nothing else to do. A batch of the sample's training rows has its count of multiplications
and additions in matrix products, the same on every machine; the mean of some batches stands for all. Divided by the
rate at which this machine multiplies the matrices of a feed-forward at best, it is a time that no rewriting of what
lies between the products could get below; beside it stands the time of the steps as they are. Evaluations come on
top, about a tenth.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402
from minipref import load_classifier, load_tokenizer, sample  # noqa: E402
from minipref.classifier import WithFieldHead  # noqa: E402
from minipref.config import recipe  # noqa: E402
from minipref.data import encode_pairs, epoch_batches, epoch_swaps, read_pairs  # noqa: E402
from minipref.judge import choose_precision  # noqa: E402
from minipref.lean import give_back_freed_memory  # noqa: E402
from minipref.optim import AdamW, decay_groups  # noqa: E402

SEED = 42
IN_PLACE = {torch.ops.aten.baddbmm_: lambda into, a, b, *_, **__: 2 * math.prod(a) * b[-1]}   # torch does not count it


class Steps:
    """Steps of the recipe `tiny` on the sample's rows, as `train.py` takes them but for a rate of 0."""

    def __init__(self, rows: int, precision: str = "fp32"):
        encoder = ROOT / train.BUNDLED_WEIGHTS
        self.config, tokenizer = recipe("tiny"), load_tokenizer(encoder)
        with tempfile.TemporaryDirectory() as folder:
            pairs = list(read_pairs(sample.write_sample(folder, train_rows=rows, test_rows=1)["train"]))
        examples = encode_pairs(pairs, tokenizer, self.config.max_length)
        self.setup = train.Setup({}, self.config, torch.device("cpu"), precision, tokenizer, pairs, examples,
                                 np.empty(0), {}, train.StopSignal())
        torch.manual_seed(SEED)
        self.model = WithFieldHead(load_classifier(encoder), tokenizer.sep_id).train()
        self.optimizer = AdamW(decay_groups(self.model, self.config.weight_decay), lr=0.0)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.batches = epoch_batches(examples.lengths, self.config.batch_size, SEED, 0)
        self.swaps = epoch_swaps(rows, SEED, 0)

    def take(self, number: int) -> None:
        rows = self.batches[number]
        train.take_step(self.model, self.optimizer, self.scaler, 0.0, [(rows, self.swaps[rows])], train.Progress(),
                        self.setup)

    def operations(self, number: int) -> int:
        """Multiplications and additions in the matrix products of a step, forward and backward."""
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            self.take(number)
        return counter.get_total_flops()


def rate(tokens: int, width: int, wider: int, seconds: float, dtype: torch.dtype) -> float:
    """Multiplications and additions a second in the products of a feed-forward: the best of the tries in `seconds`."""
    x, w = torch.randn(tokens, width).to(dtype), torch.randn(width, wider).to(dtype)
    best, until = float("inf"), time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        x @ w
        best = min(best, time.perf_counter() - begun)
    return 2 * tokens * width * wider / best


def measured(steps: Steps, chosen: np.ndarray, seconds: float = 1.0) -> dict[str, float]:
    """What a pass over all batches takes with the present number of threads, in minutes; measured on some of them."""
    tokens = int(np.median([steps.config.batch_size * steps.setup.examples.lengths[steps.batches[n]].max()
                            for n in chosen]))
    operations = statistics.mean(steps.operations(n) for n in chosen)         # which warms the machine up, too
    times = []
    for n in chosen:
        begun = time.perf_counter()
        steps.take(n)
        times.append(time.perf_counter() - begun)
    config, count = steps.model.model.config, len(steps.batches)
    dtype = torch.bfloat16 if steps.setup.precision == "bf16" else torch.float32
    per_second = rate(tokens, config.width, config.feed_forward, seconds, dtype)
    return {"tera": operations * count / 1e12, "giga_per_second": per_second / 1e9,
            "at_least": operations * count / per_second / 60, "as_it_is": statistics.mean(times) * count / 60}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=round(sample.TRAIN_ROWS * (1 - recipe("tiny").valid_fraction)),
                        help="training rows; as many as `make train` has")
    parser.add_argument("--steps", type=int, default=40, help="how many batches to measure, drawn from all")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    options = parser.parse_args(arguments)
    give_back_freed_memory()                               # as train.py does
    precision = choose_precision(options.precision, torch.device("cpu"))
    steps = Steps(options.rows, precision)
    chosen = np.random.default_rng(SEED).permutation(len(steps.batches))[:options.steps]
    passes, own = steps.config.epochs, torch.get_num_threads()
    print(f"{options.rows:,} rows in {len(steps.batches):,} steps a pass, {passes} passes, {precision}")
    for threads in sorted({1, own}):
        torch.set_num_threads(threads)
        found = measured(steps, chosen)
        print(f"{threads} thread{'s' * (threads > 1)}: {found['tera']:.1f} trillion operations in products a pass, at "
              f"{found['giga_per_second']:.0f} billion a second; one pass {found['at_least']:.1f} minutes at least and "
              f"{found['as_it_is']:.1f} as it is, {passes} passes {passes * found['at_least']:.0f} and "
              f"{passes * found['as_it_is']:.0f}")
    torch.set_num_threads(own)
    return 0


if __name__ == "__main__":
    sys.exit(main())
