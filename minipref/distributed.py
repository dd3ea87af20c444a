"""Several processes, one run: what they share out, what they sum, and how they stay of one mind.

    torchrun --standalone --nproc-per-node 4 -- train.py ...    four GPUs of this machine, or four shares of its cores

torchrun starts the same program N times and gives each a number, its rank. Every rank holds the whole model and the
whole optimizer and sees its own rows of every batch; gradients are summed, and so all take the same step. The sums are
PyTorch's: DistributedDataParallel (DDP), over NCCL between GPUs and over gloo between CPUs. This file is the handful
of calls that train.py, predict.py and judge.py need of it. Without torchrun, or with one process, each of them gives
back what it was given.

**Gradients are weighted by rows.** A step's loss is the sum over all its rows divided by their number, wherever they
are. DDP averages over *ranks* instead: with 8 rows on 3 processes (3, 3 and 2) a row of the smallest share would count
for 1.5 others. So every rank divides by the rows of the whole step, and multiplies by N what DDP will divide by N. A
rank that gets no row at all (an epoch's last batch may have fewer rows than there are ranks) computes one of them with
weight 0: DDP waits for gradients from everyone.

**Whole batches are dealt out in evaluation**, in turns. Each rank writes its rows' logits into an array of zeros, and
the arrays are added. x + 0 is exact: no row is judged twice, and what comes out is bit for bit what one process
computes with the same weights.

**Every rank takes the same decisions**, or one would wait for ever in a sum that the others never enter. Most follow
from numbers that are the same everywhere: the norm of the summed gradients, the gathered logits. Where they are not (a
signal reaches one process first, clocks differ) the ranks ask each other: `most`. Only rank 0 writes files and has its
output shown.

**What is equal for 1 and N processes**: the split, the rows of every step and their order, which are swapped, the
learning rates, the number of steps; without dropout the weights too, up to the order in which numbers are added. Not
the dropout: each rank draws its own, so that with dropout two runs are two draws of the same thing. A run that is
stopped and resumed on the same number of processes still ends as if it had not been: every rank's generator is saved.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minipref.errors import InputError

# How long a rank waits for one that lives and does not come. torchrun sees at once that a process has died; this is
# for the longest that rank 0 works alone: tokenising, writing a state to a slow disk.
PATIENCE = timedelta(hours=1)


def size() -> int:
    """How many processes the run has."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process reports what all processes of its machine find alike, such as a missing file."""
    return size() == 1 or os.environ["LOCAL_RANK"] == "0"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within this block the processes that torchrun started are one group, and only rank 0 prints to stdout."""
    if size() == 1:
        yield
        return
    # Tensors on the CPU go over gloo even beside GPUs: decisions and logits need not wait for a GPU's queue.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(dist.destroy_process_group)
        if not is_first():
            nowhere = at_the_end.enter_context(open(os.devnull, "w"))
            at_the_end.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where `device` says GPU. Errors: `InputError` where there is not one for each."""
    if size() == 1 or device.type == "cpu":
        return device
    here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.type != "cuda" or here > gpus:
        raise InputError(found=f"{here} processes on a machine with {gpus} GPUs of CUDA",
                         expected=f"--nproc-per-node {max(gpus, 1)} or less, or --device cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


# --- the model --------------------------------------------------------------------------------------------------------

def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The same forward pass, after whose backward pass every rank has the average of all ranks' gradients.

    The weights become rank 0's everywhere.
    """
    if size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)    # no second copy of all gradients


def averaging(model: nn.Module, now: bool):
    """The context of a forward and backward pass; with `now` False gradients stay on their rank and add up there."""
    return contextlib.nullcontext() if now or size() == 1 else model.no_sync()


def own_randomness(seed: int) -> None:
    """Let this rank's dropout draw its own numbers; rank 0 keeps the generator that one process would have."""
    if not is_first():
        torch.manual_seed(int(np.random.SeedSequence([seed, 5, rank()]).generate_state(1, np.uint64)[0]))


# --- shares -----------------------------------------------------------------------------------------------------------

def share(items: Sequence) -> Sequence:
    """Every N-th item from this rank's number on: no item has two ranks, and a sorted list makes equal shares."""
    return items[rank()::size()]


def batch_share(rows: np.ndarray, swapped: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """This rank's rows of a batch, and what their loss is multiplied by: N, or 0 for a row that is another's."""
    if len(rows) <= rank():
        return rows[:1], swapped[:1], 0
    return share(rows), share(swapped), size()


def dealt(batches: list[np.ndarray]) -> list[np.ndarray]:
    """This rank's batches. Every rank gets as many, some perhaps an empty one, so that all take the same turns."""
    turns = -(-len(batches) // size())
    mine = share(batches)
    return mine + [np.arange(0)] * (turns - len(mine))


# --- of one mind ------------------------------------------------------------------------------------------------------

def summed(values: np.ndarray) -> np.ndarray:
    """The sum over all ranks, on all of them, in float64. Shapes: any -> the same."""
    values = np.array(values, dtype=np.float64)
    if size() > 1:
        dist.all_reduce(torch.from_numpy(values))
    return values


def most(value: int) -> int:
    """The largest of all ranks' numbers, on all of them: whether anyone has got a signal, say."""
    if size() == 1:
        return value
    largest = torch.tensor(int(value))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def from_first(value):
    """Rank 0's value, on every rank."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gathered(value) -> list:
    """Every rank's value on rank 0, in order; on the others nothing."""
    if size() == 1:
        return [value]
    values = [None] * size() if is_first() else None
    dist.gather_object(value, values)
    return values or []


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Run the block on rank 0 and then on the others, which find the files that it wrote."""
    if not is_first():
        wait()
    try:
        yield
    finally:
        if is_first():
            wait()


def wait() -> None:
    """Until every rank is here."""
    most(0)


def is_lost(problem: RuntimeError) -> bool:
    """Whether an error says that another process is gone, which every sum notices, and no more than that."""
    return size() > 1 and (isinstance(problem, dist.DistError) or "gloo" in str(problem))


def who() -> str:
    """This process in a message: nothing where it is the only one."""
    return f" (process {rank()} of {size()})" if size() > 1 else ""
