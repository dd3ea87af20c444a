"""Run train.py or predict.py in N processes like torchrun, but started within a second.

Each of torchrun's workers imports torch. Here one server imports it once, and every rank is a fork of the server with
torchrun's environment variables. The output of a rank goes to a file. A group that does not end in time is killed, and
its test fails.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Ended(NamedTuple):
    """The exit code of a rank (below 0: the signal that killed it) and its output."""

    code: int
    out: str
    err: str


@cache
def server():
    """The process from which ranks are forked. It imports the programs for the first rank."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "predict", "ranks", "torch._dynamo"])      # DDP imports torch._dynamo
    return context


def run_ranks(size: int, program: str, arguments: list[str], before: Callable[[int], None] | None = None,
              meanwhile: Callable[[list], None] | None = None, seconds: float = 60) -> list[Ended]:
    """Run `program`.main(arguments) in `size` processes in the current folder.

    `before(rank)` is called in each process before it starts, `meanwhile(processes)` here after all have started.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path.cwd()
    ranks = [server().Process(target=_rank, args=(rank, size, port, program, arguments, folder, before))
             for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        if meanwhile:
            meanwhile(ranks)
        end = time.monotonic() + seconds
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        assert not hanging, f"ranks {hanging} did not end in {seconds} s"
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()
    return [Ended(process.exitcode, *((folder / f"{kind}-{rank}.txt").read_text() for kind in ("out", "err")))
            for rank, process in enumerate(ranks)]


def _rank(rank: int, size: int, port: int, program: str, arguments: list[str], folder: Path, before) -> None:
    os.chdir(folder)
    for kind, number in (("out", 1), ("err", 2)):
        with open(f"{kind}-{rank}.txt", "w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    signal.signal(signal.SIGINT, signal.default_int_handler)             # children of a fork server ignore it
    importlib.import_module("torch").set_num_threads(1)
    if before:
        before(rank)
    sys.exit(importlib.import_module(program).main(arguments))


# --- accidents, for `before` ------------------------------------------------------------------------------------------

def die_at_step(number: int, victim: int) -> Callable[[int], None]:
    """Kill the process of rank `victim` in the middle of its n-th step, as the system does when memory is short."""
    return partial(_at_step, number, victim, _kill_this_process)


def signal_at_step(number: int, victim: int) -> Callable[[int], None]:
    """Send SIGTERM only to rank `victim`, in its n-th step."""
    return partial(_at_step, number, victim, _terminate_this_process)


def poison_at_step(number: int, victim: int) -> Callable[[int], None]:
    """Make the loss of rank `victim` NaN in its n-th step."""
    return partial(_at_step, number, victim, _poison_the_loss)


def _at_step(number: int, victim: int, accident: Callable[[], None], rank: int) -> None:
    import train
    collate, taken = train.collate, 0

    def counting(*arguments):
        nonlocal taken
        taken += 1
        if taken == number and rank == victim:
            accident()
        return collate(*arguments)
    train.collate = counting


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _poison_the_loss() -> None:
    import train
    cross_entropy = train.F.cross_entropy

    def poisoned(*arguments, **options):
        train.F.cross_entropy = cross_entropy
        return cross_entropy(*arguments, **options) * float("nan")
    train.F.cross_entropy = poisoned
