"""Pinned memory that copies to the device are made from, used round and round.

    memory:   | free | batch 3 | open |  free  | batch 1 | batch 2 |
                               taken ▶         ▲ done

A batch is free again when the event behind its copies has passed, and not before those that were closed earlier.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from lorry.adapters.device.streams import Event

ALIGNMENT = 256  # bytes, where a piece begins


class Ring:
    """memory: uint8, its size a multiple of ALIGNMENT. Positions are bytes since the start, never wrapped."""

    def __init__(self, memory: Tensor) -> None:
        assert memory.numel() % ALIGNMENT == 0
        self._memory = memory
        self._taken = 0
        self._done = 0
        self._batches: deque[tuple[int, Event]] = deque()  # each with the position of its end

    def take(self, nbytes: int) -> Tensor | None:
        """uint8 [nbytes] of the open batch, to be written at once; None while there is no room. Never waits."""
        start = self._start(nbytes)
        if start is None:
            self._collect()
            start = self._start(nbytes)
        if start is None:
            return None
        self._taken = start + _rounded(nbytes)
        return self._memory[start % self._memory.numel() :][:nbytes]

    def close(self, event: Event) -> None:
        """All that was taken since the last call is free when `event` has passed."""
        self._collect()
        self._batches.append((self._taken, event))

    def wait(self) -> None:
        """Wait until all closed batches are free."""
        for _, event in self._batches:
            event.synchronize()

    def _start(self, nbytes: int) -> int | None:
        """Where a piece can lie, in one run."""
        size, room = self._memory.numel(), _rounded(nbytes)
        assert room <= size
        inside = self._taken % size
        start = self._taken if inside + room <= size else self._taken + size - inside
        return start if start + room <= self._done + size else None

    def _collect(self) -> None:
        while self._batches and self._batches[0][1].query():
            self._done, _ = self._batches.popleft()
        if self._done == self._taken and not self._batches:
            self._done = self._taken = 0  # from the start again: the largest piece always fits there


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
