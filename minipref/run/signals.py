"""Stopping: the first signal waits until the loop has reached a state that can be saved."""

import os
import signal
import threading
import time

from minipref.run import distributed
from minipref.runtime import Stopped, mute_closed_terminal

# From the user, the system, a closed terminal, and from batch systems shortly before a time limit. Windows has two.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopSignal:
    """Inside its block the first of `SIGNALS` waits for `check()`; a second SIGINT or SIGTERM ends the process at once.

    A signal that is ignored stays so, as SIGHUP under nohup. Not SIGINT: a shell script ignores it for whatever it puts
    into the background, and `kill -INT` still has to stop that. Outside the main thread Python allows no handlers.
    Of several processes each may get the signal twice, from the system and from torchrun: one that comes within five
    seconds of the first is taken for the same.
    """

    def __init__(self):
        self.number, self.since, self._before = 0, 0.0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            print("note: outside the main thread no signal is handled: one costs the steps since the last saved state")
            return self
        for number in SIGNALS:
            before = signal.getsignal(number)                  # None: not Python's, which could not put it back
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
        mute_closed_terminal()                 # after SIGHUP: or the next line of the log ends the run before its save

    def check(self, *_) -> None:
        """Errors: `Stopped`, in every process of a run, once a signal has reached one of them."""
        number = distributed.all_reduce_max(self.number)
        if number:                             # if not, self.number stays: a signal may have come during the sum
            self.number = number
            raise Stopped(number)
