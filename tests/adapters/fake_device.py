"""A device on which nothing happens until the test says so, and then a part of an operation at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from lorry.adapters.device.streams import Event

Operation = Iterator[bool]
"""One `next` is a part; True: it has done something, False: it waits for another stream."""


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.passed = False
        self._device = device

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        while not self.passed:
            self._device.progress()


class FakeStream:
    """Operations in order. Copies read and write when they run, in three parts."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._queue: deque[Operation] = deque()

    def enqueue(self, operation: Operation) -> None:
        self._queue.append(operation)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype
        assert _memory(source) in (_memory(target), *self._device.pinned), "a copy from memory that is not pinned waits"
        self.enqueue(_copy(target.view(-1), source.view(-1)))

    def fill(self, target: Tensor, value: float) -> None:
        self.enqueue(_fill(target, value))

    def record(self) -> Event:
        event = FakeEvent(self._device)
        self.enqueue(_pass(event))
        return event

    def wait(self, event: Event) -> None:
        self.enqueue(_wait(event))

    def advance(self) -> bool:
        """Run the next part; False: there is none, or it has to wait."""
        while self._queue:
            try:
                return next(self._queue[0])
            except StopIteration:
                self._queue.popleft()
        return False

    @property
    def idle(self) -> bool:
        return not self._queue


class FakeDevice:
    def __init__(self) -> None:
        self.steps = FakeStream(self)
        self.copies = FakeStream(self)
        self.pinned: list[int] = []

    def pin(self, memory: Tensor) -> Tensor:
        """`memory`, from now on pinned."""
        self.pinned.append(_memory(memory))
        return memory

    def progress(self) -> None:
        """Both streams go on as they can."""
        moved = [stream.advance() for stream in (self.steps, self.copies)]
        assert any(moved), "each stream waits for the other, or for what will never come"

    def end_steps(self) -> None:
        """Run the steps' stream to its end, and the other only as far as that needs."""
        while not self.steps.idle:
            if not self.steps.advance() and not self.steps.idle:
                assert self.copies.advance(), "the steps wait for what will never come"

    def drain(self, copies_first: bool = False) -> None:
        """Run everything, one stream only where the other waits for it."""
        first, second = (self.copies, self.steps) if copies_first else (self.steps, self.copies)
        while not (first.idle and second.idle):
            if not first.advance() and not second.advance():
                assert first.idle and second.idle, "each stream waits for the other"


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _copy(target: Tensor, source: Tensor) -> Operation:
    for into, out_of in zip(target.tensor_split(3), source.tensor_split(3), strict=True):
        into.copy_(out_of)
        yield True


def _fill(target: Tensor, value: float) -> Operation:
    target.fill_(value)
    yield True


def _pass(event: FakeEvent) -> Operation:
    event.passed = True
    yield True


def _wait(event: Event) -> Operation:
    while not event.query():
        yield False
