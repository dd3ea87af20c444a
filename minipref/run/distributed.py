"""Data-parallel training in several processes: sharding, reductions, and common decisions.

    torchrun --standalone --nproc-per-node 4 -- train.py ...    four processes, on four GPUs or on one CPU

torchrun starts N processes with ranks 0 to N - 1. Each rank holds the whole model and optimizer and computes its own
rows of every batch. Gradients are summed by PyTorch's DistributedDataParallel (DDP), with NCCL between GPUs and gloo
between CPUs, so all ranks take the same step. In a single process the functions below change nothing.

**Gradients are weighted by rows.** A step's loss is the mean over all its rows on all ranks. DDP averages over *ranks*
instead: with 8 rows on 3 processes (3, 3 and 2) a row of the smallest shard would count 1.5 times. So every rank
divides by the rows of the whole step and multiplies by N, which cancels DDP's division by N. A rank without a row (the
last batch of an epoch may have fewer rows than there are ranks) computes one row with weight 0, because DDP waits for
gradients from every rank.

**Evaluation shards whole batches.** Each rank writes its rows' logits into an array of zeros, and the arrays are added.
x + 0 is exact, so the sum has the same bits as the logits of a single process with the same weights.

**Every rank takes the same decisions**; otherwise a rank could wait for ever in a reduction that the others skip. Most
decisions depend on numbers that all ranks share, such as the gradient norm. For the others (signals, clocks) the ranks
use the maximum: `all_reduce_max`. Only rank 0 writes files and prints.

**The same for 1 and N processes**: the split, the rows of every step and their order, the swaps, the learning rates,
the number of steps; without dropout also the weights, up to the order of additions. Dropout differs between ranks. A
run that is stopped and resumed with the same number of processes gives the same result as an uninterrupted one, because
the random generator of every rank is saved.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minipref.runtime import InputError, RunError, Stopped, exit_code

# How long a rank waits for another. torchrun detects a dead process at once; this allows for the longest work of rank 0
# alone, such as writing a checkpoint to a slow disk.
TIMEOUT = timedelta(hours=1)


def world_size() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def is_local_main() -> bool:
    """Whether this process reports errors that occur in all processes of a machine, such as a missing file."""
    return world_size() == 1 or os.environ["LOCAL_RANK"] == "0"


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within this block torchrun's processes form a group, and only rank 0 prints to stdout.

    Errors: `RunError` if another process of the group has ended. `InputError`, `RunError` and `Stopped` occur in all
    processes. The first two are raised once per machine, `Stopped` once; other processes exit with the same code.
    """
    if world_size() == 1:
        yield
        return
    # CPU tensors use gloo even with GPUs, so decisions and logits do not wait for a GPU's queue.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(dist.destroy_process_group)
        if not is_main_process():
            nowhere = at_the_end.enter_context(open(os.devnull, "w"))
            at_the_end.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except (InputError, RunError, Stopped) as problem:
            traceback.clear_frames(problem.__traceback__)       # a DDP that outlives its group may block the exit
            if is_local_main() if isinstance(problem, InputError | RunError) else is_main_process():
                raise
            sys.exit(exit_code(problem))
        except RuntimeError as problem:
            traceback.clear_frames(problem.__traceback__)
            if not is_peer_failure(problem):
                raise
            gone = RunError(f"another process of the run has ended, so process {rank()} of {world_size()} stops too")
            for note in getattr(problem, "__notes__", []):
                gone.add_note(note)
            raise gone from None


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, if `device` is a GPU. Errors: `InputError` for more processes than GPUs."""
    if world_size() == 1 or device.type == "cpu":
        return device
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.type != "cuda" or here > gpus:
        raise InputError(found=f"{here} processes on a machine with {gpus} GPUs of CUDA",
                         expected=f"--nproc-per-node {max(gpus, 1)} or less, or --device cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


# --- the model --------------------------------------------------------------------------------------------------------

def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DDP: the backward pass averages the gradients over all ranks. Copies rank 0's weights to all.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)    # avoids a second copy of the gradients


def gradient_sync(model: nn.Module, now: bool):
    """The context of a forward and backward pass; with `now` False gradients accumulate on their rank."""
    return contextlib.nullcontext() if now or world_size() == 1 else model.no_sync()


def seed_rank(seed: int) -> None:
    """Give each rank its own dropout. Rank 0 keeps the generator of a single-process run."""
    if not is_main_process():
        torch.manual_seed(int(np.random.SeedSequence([seed, 5, rank()]).generate_state(1, np.uint64)[0]))


# --- shards -----------------------------------------------------------------------------------------------------------

def shard(items: Sequence) -> Sequence:
    """Every N-th item, starting at this rank. Shards of a sorted list are about equal."""
    return items[rank()::world_size()]


def shard_batch(rows: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """This rank's rows of a batch, and the weight of their loss: N, or 0 for a row of another rank."""
    if len(rows) <= rank():
        return rows[:1], swapped[:1], 0
    return shard(rows), shard(swapped), world_size()


def shard_batches(batches: list[np.ndarray]) -> list[np.ndarray]:
    """This rank's batches. Every rank gets the same number; the last one may be empty."""
    turns = -(-len(batches) // world_size())
    mine = shard(batches)
    return mine + [np.arange(0)] * (turns - len(mine))


# --- sums and decisions -----------------------------------------------------------------------------------------------

def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The sum over all ranks, in float64. Shapes: any -> the same."""
    values = np.array(values, dtype=np.float64)
    if world_size() > 1:
        dist.all_reduce(torch.from_numpy(values))
    return values


def all_reduce_max(value: int) -> int:
    """The maximum over all ranks."""
    if world_size() == 1:
        return value
    largest = torch.tensor(int(value))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def broadcast(value):
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(value) -> list:
    """The values of all ranks, in order, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main_process() else None
    dist.gather_object(value, values)
    return values or []


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_max(0)


def is_peer_failure(problem: RuntimeError) -> bool:
    """Whether an error only means that another process has ended, which every reduction detects."""
    return world_size() > 1 and (isinstance(problem, dist.DistError) or "gloo" in str(problem))


def rank_suffix() -> str:
    """The name of this process for messages; empty in a single-process run."""
    return f" (process {rank()} of {world_size()})" if world_size() > 1 else ""
