"""Dropout and the feed-forward with less memory and time than torch's own, and the same results.

Drawing random numbers costs as much as a good part of the matrix products on a CPU, and the feed-forward's hidden
vectors, four times as wide as any other, are most of what a training step has to keep.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE = 1 << 17          # elements worked on at once: 512 KB of float32 stay in a core's second-level cache
SLICE = 2048             # tokens whose hidden vectors are worked on at once
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # of glibc's malloc.h


class DropoutMask:
    """Zeros and ones for dropout, a fraction `keep` of ones; the same seed gives the same sequence.

    16 random bits decide on each, so `keep` is 1 - rate to within 1e-5, and dividing by it is exact. numpy's generator
    makes them six times as fast as torch's bernoulli_, which uses a whole double for each.
    """

    def __init__(self, rate: float, seed: int):
        self.dropped = min(round(rate * 2**16), 2**16 - 1)               # of 65,536 equally likely numbers
        self.keep = 1 - self.dropped / 2**16
        self.random = np.random.Generator(np.random.SFC64(seed))

    def fill(self, out: Tensor) -> Tensor:
        """The next zeros and ones, written into `out`, a contiguous tensor on the CPU."""
        words = self.random.integers(0, 2**64 - 1, -(-out.numel() // 4), np.uint64, endpoint=True)
        numbers = torch.from_numpy(words.view(np.int16))[:out.numel()].view_as(out)
        return torch.ge(numbers, self.dropped - 2**15, out=out)


def draw_seed() -> int:
    """A seed from torch's global generator; restoring that generator reproduces the dropout mask."""
    return int(torch.randint(2**62, ()))


class FastDropout(nn.Dropout):
    """`nn.Dropout` that on a CPU keeps a seed for the backward pass in place of the mask."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.p > 0 and x.device.type == "cpu":
            return _Dropout.apply(x, self.p, draw_seed())
        return super().forward(x)


class _Dropout(torch.autograd.Function):
    """x with elements set to 0 with probability `rate`, and the others divided by 1 - rate."""

    @staticmethod
    def forward(ctx, x, rate, seed):
        ctx.rate, ctx.seed = rate, seed
        return _drop(x, rate, seed)

    @staticmethod
    def backward(ctx, d_out):
        return _Dropout.apply(d_out, ctx.rate, ctx.seed), None, None     # dropout is linear: its own derivative


def _drop(x: Tensor, rate: float, seed: int) -> Tensor:
    mask = DropoutMask(rate, seed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    drawn = torch.empty(min(PIECE, x.numel()), dtype=x.dtype)
    for source, result in zip(x.flatten().split(PIECE), out.view(-1).split(PIECE)):
        torch.mul(source, 1 / mask.keep, out=result).mul_(mask.fill(drawn[:len(source)]))
    return out


def without_autocast(function: Callable) -> Callable:
    """For the halves of an autograd.Function: products in the precision of their inputs, whatever surrounds them."""
    @wraps(function)
    def wrapped(ctx, x, *others):
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *others)
    return wrapped


def feed_forward(x: Tensor, ff_in: nn.Linear, ff_out: nn.Linear) -> Tensor:
    """`ff_out(gelu(ff_in(x)))` with the exact GELU, the one with erf.

    Training keeps the hidden vectors before the GELU and recomputes those after it. Without gradients a slice of the
    tokens at a time is worked on, which stays in the cache.

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
        del hidden                                                       # its memory is wanted for d_hidden
        d_hidden = d_out @ weight.to(x.dtype)
        torch.ops.aten.gelu_backward.grad_input(d_hidden, x, grad_input=d_hidden)
        return d_hidden, d_weight, d_bias


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in autocast's precision, where autocast is on: for several products of one tensor, each of which would convert
    it again."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def tune_malloc(mmap_threshold: int = 8 << 20, trim_threshold: int = 64 << 20) -> None:
    """Let every freed tensor of `mmap_threshold` bytes go back to the system at once; programs call it at their start.

    glibc keeps freed blocks of up to 32 MB for later use. A training step frees activations in another order than it
    allocates them, and a quarter of its peak would be holes. Smaller blocks stay, up to `trim_threshold` bytes at the
    heap's end: glibc, once one threshold is set by hand, would return all but 128 KB and fault in thousands of zeroed
    pages a step. Without glibc nothing happens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, mmap_threshold)
            mallopt(M_TRIM_THRESHOLD, trim_threshold)
