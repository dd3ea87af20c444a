"""Cost of a run: memory by model and precision; time by rows, length, width and processes.

    python benchmarks/scaling.py                      all parts; sections of docs/benchmarks.md; then run `make docs`
    python benchmarks/scaling.py memory               only this part

`memory` is computed: the real model runs a training step on torch's fake tensors, which have no content, with the
attention of a GPU, and every allocation is counted. `growth` is measured on this machine.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - these need the path
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from minipref.config import EncoderConfig  # noqa: E402
from minipref.fast import accelerate, checkpoint_activations  # noqa: E402
from minipref.model import PreferenceModel, distance_buckets  # noqa: E402
from minipref.optim import AdamW, decay_groups  # noqa: E402
from minipref.run import distributed  # noqa: E402
from minipref.runtime import write_text  # noqa: E402

PAGE, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "scaling.json"
SIZES = {  # the published v3 encoders: one architecture, four sizes
    "v3-xsmall": EncoderConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
    "v3-small": EncoderConfig(),
    "v3-base": EncoderConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "v3-large": EncoderConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
GB = 2**30
CARDS = (8, 16, 24, 80)          # GB
ROWS = (1, 8, 64, 512)           # batch sizes whose memory is counted
USABLE = 0.9                     # share of a card; CUDA, workspaces of kernels and fragmentation take the rest


# --- memory: computed -------------------------------------------------------------------------------------------------

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors after each operation, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:                            # a view, or an operation in place
            return

        def gone(_):
            self.now -= size
            del self.alive[key]
        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def as_on_a_gpu(config: EncoderConfig, length: int) -> Iterator[LiveBytes]:
    """Within this block tensors have no content, their bytes are counted, and a CPU build of torch behaves like CUDA.

    Attention is batched and uses torch's memory-efficient kernel; dropout stores a mask, not a seed; autocast computes
    LayerNorm in float32. The rows of the relative table are computed beforehand, because fake tensors have no values.
    """
    buckets = distance_buckets(length, config.position_buckets, config.max_distance)
    lowest, highest = int(buckets[0]), int(buckets[-1])
    layer_norm = F.layer_norm

    def relative_table(encoder, length):
        table = encoder.rel_norm(encoder.rel_embeddings.weight[lowest:highest + 1])
        return table, torch.empty(2 * length - 1, dtype=torch.int64)

    def attention(q, k, v, attn_mask, dropout_p, scale):
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p,
                                                                      scale=scale)[0]

    def layer_norm_in_float32(x, *arguments, **options):
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), *arguments, **options)

    with (mock.patch("minipref.fast.attention.select_backend", lambda device: "batched"),
          mock.patch("minipref.fast.FastEncoder.relative_table", relative_table),
          mock.patch("minipref.fast.layers.FastDropout.forward", nn.Dropout.forward),
          mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
          mock.patch("torch.nn.functional.layer_norm", layer_norm_in_float32),
          FakeTensorMode(), LiveBytes() as live):
        yield live


def step_bytes(config: EncoderConfig, rows: int, length: int, precision: str, checkpoint: bool) -> dict[str, int]:
    """Bytes of one training step on a GPU: `weights`, `gradients`, `moments`, and `peak`.

    The peak is the larger of two: forward and backward pass plus the moments, or the optimizer step, which on a GPU has
    two temporary tensors of the size of the largest parameter.
    """
    with as_on_a_gpu(config, length) as live:
        model = accelerate(PreferenceModel(config)).train()
        if checkpoint:
            checkpoint_activations(model)
        weights = live.now
        ids, attention_mask = torch.ones(rows, length, dtype=torch.int64), torch.ones(rows, length, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            logits = model(ids, attention_mask)
        F.cross_entropy(logits.float(), torch.zeros(rows, dtype=torch.int64)).backward()
        peak = live.peak
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    moments = 2 * sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    return {"weights": weights, "gradients": gradients, "moments": moments,
            "peak": max(peak + moments, weights + gradients + moments + 2 * largest)}


def fitting_rows(peaks: list[int], card: int) -> str:
    """The largest micro-batch on a card of `card` GB, from the peaks at `ROWS` rows.

    The peak is a convex function of the rows, so linear interpolation overestimates it and the result is safe.
    """
    limit = card * GB * USABLE
    if limit < peaks[0]:
        return "0"
    return f"{ROWS[-1]}+" if limit >= peaks[-1] else str(int(np.interp(limit, peaks, ROWS)))


def memory() -> str:
    header = ["encoder", "precision", "checkpointed", "fixed", "peak, 8 rows",
              *(f"rows on {card} GB" for card in CARDS)]
    table = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for name, config in SIZES.items():
        for precision in ("fp32", "bf16, fp16"):
            for checkpoint in (False, True):
                counted = [step_bytes(config, rows, 512, precision, checkpoint) for rows in ROWS]
                peaks, at_8 = [c["peak"] for c in counted], counted[ROWS.index(8)]
                fixed = at_8["weights"] + at_8["gradients"] + at_8["moments"]
                table.append([name, precision, "yes" if checkpoint else "", f"{fixed / GB:.2f}",
                              f"{at_8['peak'] / GB:.2f}", *(fitting_rows(peaks, card) for card in CARDS)])
                print(" ".join(table[-1]), flush=True)
    return MEMORY.format(table=markdown(table), usable=f"{USABLE:.0%}")


# --- growth: measured -------------------------------------------------------------------------------------------------

BASE = {"rows": 4, "length": 128, "width": 192}
AXES = {"rows": (1, 2, 4, 8, 16, 32), "length": (32, 64, 128, 256, 512, 1024), "width": (64, 128, 256, 512)}


def step_seconds(rows: int, length: int, width: int, steps: int = 3) -> float:
    """Seconds of the fastest of some training steps of a four-layer encoder in float32.

    Under torchrun each process has its shard of the rows, and the step ends when all processes have finished.
    """
    torch.manual_seed(0)
    config = EncoderConfig(vocab_size=8000, hidden_size=width, num_attention_heads=max(1, width // 64),
                           num_hidden_layers=4, intermediate_size=4 * width)
    alone = accelerate(PreferenceModel(config)).train()
    model, optimizer = distributed.wrap_ddp(alone, torch.device("cpu")), AdamW(decay_groups(alone, 0.01), lr=1e-5)
    ids = torch.randint(4, 8000, (len(distributed.shard(range(rows))), length))
    attention_mask, labels = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.int64)
    times = []
    for _ in range(steps + 1):                           # the first one allocates buffers
        distributed.barrier()
        started = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(ids, attention_mask), labels).backward()
        optimizer.step()
        distributed.barrier()
        times.append(time.monotonic() - started)
    return min(times[1:])


def processes_seconds(count: int, rows: int = 16) -> float:
    """`step_seconds` of a batch of `rows` in `count` processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--",
               __file__, "--worker", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(done.stdout.split()[-1])


def growth() -> str:
    """Measure along each axis, with the others at `BASE`, and save the data of the figure."""
    torch.set_num_threads(1)
    measured = {}
    for axis, values in AXES.items():
        measured[axis] = [(value, step_seconds(**BASE | {axis: value})) for value in values]
        print(axis, measured[axis], flush=True)
    cores = len(os.sched_getaffinity(0))
    measured["processes"] = [(count, processes_seconds(count)) for count in range(1, cores + 1)]
    print("processes", measured["processes"], flush=True)
    save(measured)
    table = [["axis", "others", *[""] * max(map(len, AXES.values())), "last doubling"], ["---", "---"]]
    table[1] += ["---:"] * (len(table[0]) - 2)
    for axis, points in measured.items():
        others = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != axis)
        cells = [f"{value:,}: {1000 * seconds:,.0f} ms" for value, seconds in points]
        last = f"x {points[-1][1] / points[-2][1]:.2f}" if len(points) > 1 else ""
        table.append([axis, others if axis != "processes" else "rows 16 in all, length 128, width 192", *cells,
                      *[""] * (len(table[0]) - 3 - len(cells)), last])
    return GROWTH.format(machine=machine(), table=markdown(table))


def save(measured: dict[str, list[tuple[int, float]]]) -> None:
    """Write the data of the figure, which `make docs` draws."""
    points = {axis: [[value, round(1000 * seconds, 1)] for value, seconds in pairs] for axis, pairs in measured.items()}
    write_text(FIGURES, json.dumps({"machine": machine(), "milliseconds": points}, indent=1) + "\n")


# --- the page ---------------------------------------------------------------------------------------------------------

def markdown(table: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def machine() -> str:
    return (f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
            f"{len(os.sched_getaffinity(0))} cores, one thread in each process")


def write_page(parts: dict[str, str]) -> None:
    """Write these parts between their marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, found, after = text.partition(begin)
        _, found_end, after = after.partition(end)
        if not (found and found_end):
            raise SystemExit(f"{PAGE.name} has no place marked <!-- {name} --> ... <!-- end -->")
        text = before + begin + part.strip() + end + after
    write_text(PAGE, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--worker", type=int, metavar="ROWS", help="used internally by `growth`")
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(1)
        with distributed.process_group():
            print(step_seconds(options.worker, BASE["length"], BASE["width"]))
        return 0
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    made = {name: PARTS[name]() for name in PARTS if name in options.parts or not options.parts}
    write_page(made)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


PARTS: dict[str, Callable[[], str]] = {"memory": memory, "growth": growth}

MEMORY = """
GB (2^30 bytes) for rows of 512 tokens, with dropout. 'Fixed' are weights, gradients and AdamW's two moments, float32 in
every precision and in every process. 'Peak' is the most that is alive at once in a step. 'Rows' is the largest
micro-batch on one GPU with {usable} of its memory in use; a larger batch needs `--accumulate`. 'Checkpointed' is
`--checkpoint-activations`, which costs a second forward pass. With few rows the peak is AdamW's step, which takes the
same memory in every precision.

{table}
"""

GROWTH = """
{machine}.
Other programs used them too, so a point may be off by a factor of 1.5. Four layers, vocabulary 8,000, float32, forward
pass to AdamW, the fastest of three steps.

![Milliseconds of a training step by rows, length, width and processes](scaling.svg)

{table}
"""

if __name__ == "__main__":
    sys.exit(main())
