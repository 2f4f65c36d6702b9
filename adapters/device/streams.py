"""A device's queues as the adapters use them: one runs the steps, another copies pages beside it."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor


class Event(Protocol):
    """A place in a stream. query: whether all work before it is done; synchronize: wait until it is."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Stream(Protocol):
    """Does what it is told in that order, later; no call waits."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target ← source of the same shape and dtype, on the device or in pinned memory; both stay as they are
        until the copy has run."""

    def fill(self, target: Tensor, value: float) -> None:
        """Every element of `target` ← value."""

    def record(self) -> Event:
        """The event behind all that the stream has been told so far."""
        ...

    def wait(self, event: Event) -> None:
        """Whatever comes next waits for an event of another stream."""


class CudaStream:
    """stream: None is whichever is current when the call is made."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def fill(self, target: Tensor, value: float) -> None:
        with torch.cuda.stream(self._stream):
            target.fill_(value)

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._get())
        return cast(Event, event)

    def wait(self, event: Event) -> None:
        self._get().wait_event(cast(torch.cuda.Event, event))

    def _get(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)
