"""Signals: the first one is held until the loop can save its state."""

import os
import signal
import threading
import time

from minipref.run import distributed
from minipref.runtime import Stopped, mute_closed_terminal

# From the user, the system, a closed terminal, and batch systems before a time limit. Windows has only two of them.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopSignal:
    """Hold the first of `SIGNALS` until `check()`. If that is SIGINT or SIGTERM, another of these two ends the process.

    Ignored signals stay ignored, such as SIGHUP under nohup. SIGINT is an exception: shell scripts ignore it for
    background jobs, and `kill -INT` must still stop those. Outside the main thread Python allows no handlers.
    With torchrun a process may get the same signal twice, from the system and from torchrun, so another signal within
    five seconds of the last is ignored.
    """

    def __init__(self):
        self.number, self.since, self._before = 0, 0.0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            print("note: signals are not handled outside the main thread: a signal loses the steps since the last save")
            return self
        for number in SIGNALS:
            before = signal.getsignal(number)                  # None: set outside Python, cannot be restored
            if before is not None and (before != signal.SIG_IGN or number == signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        is_second = {self.number, number} <= {signal.SIGINT, signal.SIGTERM}
        if is_second and (distributed.world_size() == 1 or time.monotonic() - self.since > 5):
            os._exit(128 + number)
        self.number, self.since = self.number or number, time.monotonic()
        mute_closed_terminal()                 # after SIGHUP the next print would end the run before it is saved

    def check(self, *_) -> None:
        """Errors: `Stopped`, in every process of a run, after one of them received a signal."""
        number = distributed.all_reduce_max(self.number)
        if number:                             # if not, keep self.number: a signal may have come during the reduction
            self.number = number
            raise Stopped(number)
