"""Dropout and feed-forward that need less memory and time than torch's own.

On a CPU, drawing dropout masks takes a time comparable to that of the matrix products. The feed-forward's hidden
activations, four times as wide as the others, take most of the memory of a training step.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE = 1 << 17          # elements per step: 512 KB of float32 stay in a core's second-level cache
SLICE = 2048             # tokens per step of the feed-forward
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # of glibc's malloc.h


class DropoutMask:
    """Dropout masks of zeros and ones, with a fraction `keep` of ones; the same seed gives the same sequence.

    Each element uses 16 random bits: `keep` is 1 - rate within 1e-5, and dividing by it is unbiased. numpy's
    generator is six times as fast as torch's bernoulli_, which draws a double for each element.
    """

    def __init__(self, rate: float, seed: int):
        self.dropped = min(round(rate * 2**16), 2**16 - 1)               # of 65,536 equally likely numbers
        self.keep = 1 - self.dropped / 2**16
        self.random = np.random.Generator(np.random.SFC64(seed))

    def fill(self, out: Tensor) -> Tensor:
        """Write the next zeros and ones into `out`, a contiguous tensor on the CPU."""
        words = self.random.integers(0, 2**64 - 1, -(-out.numel() // 4), np.uint64, endpoint=True)
        numbers = torch.from_numpy(words.view(np.int16))[:out.numel()].view_as(out)
        return torch.ge(numbers, self.dropped - 2**15, out=out)


def draw_seed() -> int:
    """A seed from torch's global generator; restoring that generator reproduces the dropout mask."""
    return int(torch.randint(2**62, ()))


class FastDropout(nn.Dropout):
    """`nn.Dropout` that on a CPU stores a seed for the backward pass instead of the mask."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.p > 0 and x.device.type == "cpu":
            return _Dropout.apply(x, self.p, draw_seed())
        return super().forward(x)


class _Dropout(torch.autograd.Function):
    """Sets elements of x to 0 with probability `rate` and divides the others by 1 - rate."""

    @staticmethod
    def forward(ctx, x, rate, seed):
        ctx.rate, ctx.seed = rate, seed
        return _drop(x, rate, seed)

    @staticmethod
    def backward(ctx, d_out):
        return _Dropout.apply(d_out, ctx.rate, ctx.seed), None, None     # dropout is linear and diagonal


def _drop(x: Tensor, rate: float, seed: int) -> Tensor:
    mask = DropoutMask(rate, seed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    drawn = torch.empty(min(PIECE, x.numel()), dtype=x.dtype)
    for source, result in zip(x.flatten().split(PIECE), out.view(-1).split(PIECE)):
        torch.mul(source, 1 / mask.keep, out=result).mul_(mask.fill(drawn[:len(source)]))
    return out


def without_autocast(function: Callable) -> Callable:
    """Decorator for forward and backward of an autograd.Function: computes in the precision of the inputs."""
    @wraps(function)
    def wrapped(ctx, x, *others):
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *others)
    return wrapped


def feed_forward(x: Tensor, ff_in: nn.Linear, ff_out: nn.Linear) -> Tensor:
    """`ff_out(gelu(ff_in(x)))` with the exact GELU, with erf.

    Training stores the hidden activations before the GELU and recomputes those after it. Without gradients the tokens
    are processed in slices that stay in the cache.

    Shapes: x (B, L, D) -> (B, L, D).
    """
    if torch.is_grad_enabled():
        return _GeluLinear.apply(ff_in(x), ff_out.weight, ff_out.bias)
    slices = x.flatten(0, 1).split(SLICE)
    return torch.cat([ff_out(F.gelu(ff_in(part))) for part in slices]).view_as(x)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)), in the precision of x."""

    @staticmethod
    @without_autocast
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        return F.linear(F.gelu(x), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        d_out = d_out.to(x.dtype)
        d_rows, hidden = d_out.flatten(0, -2), F.gelu(x).flatten(0, -2)
        d_weight = (d_rows.mT @ hidden).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_bias = d_rows.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        del hidden                                                       # frees memory for d_hidden
        d_hidden = d_out @ weight.to(x.dtype)
        torch.ops.aten.gelu_backward.grad_input(d_hidden, x, grad_input=d_hidden)
        return d_hidden, d_weight, d_bias


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's precision, if autocast is on: convert x once, not again in each product that uses it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def tune_malloc(mmap_threshold: int = 8 << 20, trim_threshold: int = 64 << 20) -> None:
    """Return every freed tensor of at least `mmap_threshold` bytes to the system at once. Without glibc, do nothing.

    By default glibc keeps freed blocks of up to 32 MB. A training step frees activations in another order than it
    allocates them, so fragmentation would take a quarter of its peak memory. Smaller blocks are kept, up to
    `trim_threshold` bytes at the end of the heap. This threshold must be set too: setting the other one disables
    glibc's adaptive value, and the default of 128 KB would cause thousands of page faults a step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, mmap_threshold)
            mallopt(M_TRIM_THRESHOLD, trim_threshold)
