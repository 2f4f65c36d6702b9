"""A bounded share of the time of a core for work beside the step loop, in slices.

    pause after work of w seconds:   w (1 / share - 1)        share = work / (work + pauses)

The forward pass computes on all cores and meets at barriers: whatever takes one of them holds up the others for as
long. A slice is a fiftieth of a step of 50 ms, and so many pauses lie between two slices that a step meets few.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SLICE = 0.001  # seconds of a core
LONGEST = 0.1  # seconds of a pause, whatever a slice has taken

Rest = Callable[[], None]
"""To be called every millisecond of work, about, without anything held that others wait for."""


def no_rest() -> None:
    """Nobody is to be spared."""


class Pace:
    """How much the threads that `rest` may take, each of them. share: at most 1, which is without a pause; any thread
    may set it, and what is set holds from the next pause on.

    used: seconds that the calling thread has computed; waiting for the disk, or for a core, is no work.
    """

    def __init__(
        self, used: Callable[[], float] = time.thread_time, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self.share = 1.0
        self._used = used
        self._sleep = sleep
        self._paused = threading.local()

    def begin(self) -> None:
        """Work begins in this thread; what it did before counts for nothing."""
        self._paused.at = self._used()

    def rest(self) -> None:
        """Pause, when the work since the last pause is a slice or more."""
        share, now = self.share, self._used()
        if not hasattr(self._paused, "at"):
            self._paused.at = now
        work = now - self._paused.at
        if work < SLICE:
            return
        if share < 1:
            self._sleep(min(LONGEST, work * (1 / share - 1)))
        self._paused.at = now
