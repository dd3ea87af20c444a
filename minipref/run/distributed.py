"""Several processes, one run: which rows each gets, what they sum, and how they take the same decisions.

    torchrun --standalone --nproc-per-node 4 -- train.py ...    four GPUs of this machine, or four shares of its cores

torchrun starts the same program N times and gives each a number, its rank. Every rank holds the whole model and the
whole optimizer and sees its own rows of every batch; gradients are summed, so all take the same step. The sums are
PyTorch's: DistributedDataParallel (DDP), over NCCL between GPUs and over gloo between CPUs. Without torchrun, or with
one process, each function below returns what it was given.

**Gradients are weighted by rows.** A step's loss is the sum over all its rows divided by their number, wherever they
are. DDP averages over *ranks* instead: with 8 rows on 3 processes (3, 3 and 2) a row of the smallest shard would count
for 1.5 others. So every rank divides by the rows of the whole step, and multiplies by N what DDP will divide by N. A
rank without a row (an epoch's last batch may have fewer rows than there are ranks) computes one row with weight 0,
because DDP waits for gradients from every rank.

**Evaluation shards whole batches.** Each rank writes its rows' logits into an array of zeros, and the arrays are added.
x + 0 is exact: no row is predicted twice, and the sum is bit for bit what one process computes with the same weights.

**Every rank takes the same decisions**, or one would wait for ever in a sum that the others never enter. Most follow
from numbers that are the same everywhere: the norm of the summed gradients, the gathered logits. Where they are not (a
signal reaches one process first, clocks differ) the ranks take the maximum: `all_reduce_max`. Only rank 0 writes files
and has its output shown.

**What is equal for 1 and N processes**: the split, the rows of every step and their order, the swaps, the learning
rates, the number of steps; without dropout the weights too, up to the order of additions. Dropout differs: each rank
draws its own. A run that is stopped and resumed with as many processes still ends as if it had not been: every rank's
generator is saved.
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

# How long a rank waits for another. torchrun sees at once that a process has died; this is for the longest that rank 0
# works alone: tokenizing, writing a checkpoint to a slow disk.
TIMEOUT = timedelta(hours=1)


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def is_local_main() -> bool:
    """Whether this process reports what all processes of its machine find alike, such as a missing file."""
    return world_size() == 1 or os.environ["LOCAL_RANK"] == "0"


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within this block the processes that torchrun started are one group, and only rank 0 prints to stdout.

    Errors: `RunError` where another process of the group is gone. What all processes meet alike (`InputError`,
    `RunError`, `Stopped`) is raised in one of them and ends the others with the same exit code, so it is reported once.
    """
    if world_size() == 1:
        yield
        return
    # Tensors on the CPU go over gloo even beside GPUs: decisions and logits need not wait for a GPU's queue.
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
            gone = RunError(f"another process of the run is gone, and process {rank()} of {world_size()} stops with it")
            for note in getattr(problem, "__notes__", []):
                gone.add_note(note)
            raise gone from None


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, where `device` says GPU. Errors: `InputError` where there is not one for each."""
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
    """The same forward pass, after whose backward pass every rank has the average of all ranks' gradients.

    The weights become rank 0's everywhere.
    """
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)    # no second copy of all gradients


def gradient_sync(model: nn.Module, now: bool):
    """The context of a forward and backward pass; with `now` False gradients stay on their rank and add up there."""
    return contextlib.nullcontext() if now or world_size() == 1 else model.no_sync()


def seed_rank(seed: int) -> None:
    """Let this rank's dropout draw its own numbers; rank 0 keeps the generator that one process would have."""
    if not is_main_process():
        torch.manual_seed(int(np.random.SeedSequence([seed, 5, rank()]).generate_state(1, np.uint64)[0]))


# --- shards -----------------------------------------------------------------------------------------------------------

def shard(items: Sequence) -> Sequence:
    """Every N-th item, starting at this rank: each item has one rank, and a sorted list makes equal shards."""
    return items[rank()::world_size()]


def shard_batch(rows: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """This rank's rows of a batch, and the weight of their loss: N, or 0 for a row of another rank."""
    if len(rows) <= rank():
        return rows[:1], swapped[:1], 0
    return shard(rows), shard(swapped), world_size()


def shard_batches(batches: list[np.ndarray]) -> list[np.ndarray]:
    """This rank's batches. Every rank gets as many, some perhaps an empty one."""
    turns = -(-len(batches) // world_size())
    mine = shard(batches)
    return mine + [np.arange(0)] * (turns - len(mine))


# --- sums and decisions -----------------------------------------------------------------------------------------------

def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The sum over all ranks, on all of them, in float64. Shapes: any -> the same."""
    values = np.array(values, dtype=np.float64)
    if world_size() > 1:
        dist.all_reduce(torch.from_numpy(values))
    return values


def all_reduce_max(value: int) -> int:
    """The largest of all ranks' numbers, on all of them."""
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
    """Every rank's value on rank 0, in order; on the others nothing."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main_process() else None
    dist.gather_object(value, values)
    return values or []


def barrier() -> None:
    """Until every rank is here."""
    all_reduce_max(0)


def is_peer_failure(problem: RuntimeError) -> bool:
    """Whether an error says that another process is gone, which every sum notices, and no more than that."""
    return world_size() > 1 and (isinstance(problem, dist.DistError) or "gloo" in str(problem))


def rank_suffix() -> str:
    """This process in a message; empty where it is the only one."""
    return f" (process {rank()} of {world_size()})" if world_size() > 1 else ""
