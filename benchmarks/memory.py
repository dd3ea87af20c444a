"""The memory of a training step by model, precision and rows, computed; the section of docs/benchmarks.md.

    python benchmarks/memory.py

The real model runs a training step on torch's fake tensors, which have no content, with the attention of a GPU, and
every allocation is counted.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator
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
from minipref.runtime import write_text  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"
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
    for name in ("v3-small", "v3-base", "v3-large"):       # xsmall needs less than small
        config = SIZES[name]
        for precision in ("fp32", "bf16, fp16"):
            for checkpoint in (False, True):
                counted = [step_bytes(config, rows, 512, precision, checkpoint) for rows in ROWS]
                peaks, at_8 = [c["peak"] for c in counted], counted[ROWS.index(8)]
                fixed = at_8["weights"] + at_8["gradients"] + at_8["moments"]
                table.append([name, precision, "yes" if checkpoint else "", f"{fixed / GB:.2f}",
                              f"{at_8['peak'] / GB:.2f}", *(fitting_rows(peaks, card) for card in CARDS)])
                print(" ".join(table[-1]), flush=True)
    return MEMORY.format(table=markdown(table), usable=f"{USABLE:.0%}")


# --- the page ---------------------------------------------------------------------------------------------------------

def markdown(table: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def write_page(section: str) -> None:
    """Write the section between its marks in the page."""
    before, found, after = PAGE.read_text(encoding="utf-8").partition("<!-- memory -->\n")
    _, found_end, after = after.partition("\n<!-- /memory -->")
    if not (found and found_end):
        raise SystemExit(f"{PAGE.name} has no place marked <!-- memory --> ... <!-- /memory -->")
    write_text(PAGE, before + found + section.strip() + found_end + after)


MEMORY = """
GB (2^30 bytes) for rows of 512 tokens, with dropout. 'Fixed' are weights, gradients and AdamW's two moments, float32 in
every precision and in every process. 'Peak' is the most that is alive at once in a step. 'Rows' is the largest
micro-batch on one GPU with {usable} of its memory in use, interpolated between 1, 8, 64 and 512 rows; a larger batch
needs `--accumulate`. 'Checkpointed' is `--checkpoint-activations`, which costs a second forward pass. With few rows the
peak is AdamW's step, which takes the same memory in every precision.

{table}
"""

if __name__ == "__main__":
    write_page(memory())
