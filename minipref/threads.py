"""How the threads of a CPU wait for each other. This has to be imported before torch.

    import minipref.threads

OpenMP threads wait for each other at the end of a matrix product. By default they spin, which saves the microseconds of
waking up. While other programs are busy, a spinning thread takes the core that another thread needs. With
OMP_WAIT_POLICY=PASSIVE threads sleep instead. No result depends on it, and a policy set by the user is kept.
"""

import os
import sys
import time
from pathlib import Path

SECONDS = 0.15       # of observation at the start
BUSY_CORES = 0.5     # waiting threads sleep if other programs use this many cores or more


def busy_cores(seconds: float = SECONDS) -> float:
    """How many cores all programs together have kept busy in the last `seconds`; 0 where Linux's /proc is missing."""
    def ticks() -> list[int]:
        return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    try:
        before = ticks()
        time.sleep(seconds)
        passed = [after - earlier for after, earlier in zip(ticks(), before)]
    except (OSError, ValueError):
        return 0.0
    idle = passed[3] + passed[4]             # idle, and idle while a disk works
    return (1 - idle / max(1, sum(passed))) * (os.cpu_count() or 1)


def choose_waiting() -> str:
    """Set the policy, unless torch is loaded or somebody has set one. Returns a note, usually an empty one."""
    if "torch" in sys.modules or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return ""
    busy = busy_cores()
    if busy < BUSY_CORES:
        return ""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return f", waiting passively (other programs keep {busy:.1f} cores busy)"


NOTE = choose_waiting()
