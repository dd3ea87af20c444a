"""Stopping: the first SIGINT or SIGTERM waits until the loop has reached a state that can be saved."""

import os
import signal
import time

from minipref.run import distributed
from minipref.runtime import Stopped


class StopSignal:
    """Inside its block the first SIGINT or SIGTERM waits for `check()`; a second ends the process at once.

    Of several processes each may get the signal twice, from the system and from torchrun: one that comes within five
    seconds of the first is taken for the same.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.number and (distributed.world_size() == 1 or time.monotonic() - self.since > 5):
            os._exit(128 + number)
        self.number, self.since = number, time.monotonic()

    def check(self, *_) -> None:
        """Errors: `Stopped`, in every process of a run, once a signal has reached one of them."""
        number = distributed.all_reduce_max(self.number)
        if number:                             # if not, self.number stays: a signal may have come during the sum
            self.number = number
            raise Stopped(number)
