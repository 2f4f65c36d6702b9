"""How pages and tables get to where the kernels read them: at once on a CPU, beside the steps on a GPU.

    host memory ─ memcpy ─▶ ring, pinned ─ copies' stream ─▶ pages     behind the steps that read their old content
                                        └─ steps' stream ──▶ tables    between two steps
                                page ───── steps' stream ──▶ page      a move, behind the copies so far

Copies to the GPU are made from one ring that is allocated at the start. The loading thread could fill pinned memory
instead, and save the engine thread a memcpy of `budget` bytes a step. But then whole adapters lie there, of up to
gigabytes, and what falls out of the device comes back without a load: memory to be pinned while serving, or a ring all
the same with two threads at it. The memcpy runs while the device is at a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorry.adapters.device.ring import ALIGNMENT, Ring
from lorry.adapters.device.streams import CudaStream, Event, Stream
from lorry.kernels.pieces import Piece, copy_pieces, copy_serially

RING_BYTES = 32 << 20


class Uploads(Protocol):
    """What the pool asks for. Targets are contiguous pieces of its device tensors, sources contiguous host tensors that
    may change after the call. Nothing waits but `wait`."""

    def budget(self, step: float) -> int:
        """Bytes to be copied between two steps, about, where a step takes so many seconds."""
        ...

    @property
    def reads_back(self) -> bool:
        """Whether the arena is host memory; where it is not, the pool keeps what it has uploaded."""
        ...

    def take_over(self) -> None:
        """From now on pages may be written that the steps so far read."""

    def pages(self, arena: Tensor, pages: Sequence[Piece]) -> int:
        """Copy pages to their offsets in the arena, beside the steps; how many: there is no room on the way for the
        others now."""
        ...

    def mark(self) -> Event:
        """Passes when all pages so far are there. Due whenever pages have been copied, before any other call."""
        ...

    def write(self, target: Tensor, source: Tensor) -> bool:
        """Copy a small tensor, after the steps so far and before the next one; False as above."""
        ...

    def fill(self, target: Tensor, value: float) -> None:
        """Every element of `target` ← value, after the steps so far and before the next one."""

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy a page within the arena, after steps and pages so far, before the next step.

        `take_over` is due before the next page. target and source do not overlap.
        """

    def wait(self) -> None:
        """Wait for all pages and tables so far."""


class _Past:
    """What was done at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class AtOnce:
    """The arena is host memory, and the engine thread, between two steps, the only one to touch it.

    least, most: bytes between two steps, for short and for long ones; rate: bytes for each second of a step. 4 MiB take
    1 ms, so that copies are a twentieth of steps of 12 to 100 ms.
    """

    reads_back = True

    def __init__(self, least: int = 2 << 20, most: int = 16 << 20, rate: float = 160 << 20) -> None:
        self._least, self._most, self._rate = least, most, rate

    def budget(self, step: float) -> int:
        return max(self._least, min(self._most, int(step * self._rate)))

    def take_over(self) -> None:
        pass

    def pages(self, arena: Tensor, pages: Sequence[Piece]) -> int:
        copy_pieces(arena, pages)
        return len(pages)

    def mark(self) -> Event:
        return _Past()

    def write(self, target: Tensor, source: Tensor) -> bool:
        target.copy_(source)
        return True

    def fill(self, target: Tensor, value: float) -> None:
        target.fill_(value)

    def move(self, target: Tensor, source: Tensor) -> None:
        copy_serially(target, source)

    def wait(self) -> None:
        pass


class Beside:
    """Copies on one stream while steps run on another; the engine thread only enqueues.

    staging: uint8, pinned, for the ring. budget: not yet measured on a GPU; at 4 MiB the 84 MB of an 8B model's
    adapter of rank 16 take 21 steps.
    """

    reads_back = False

    def __init__(self, steps: Stream, copies: Stream, staging: Tensor, budget: int = 4 << 20) -> None:
        self._budget = budget
        self._steps = steps
        self._copies = copies
        self._ring = Ring(staging)
        self._unseen: Event | None = None  # behind the pages that the steps' stream has not waited for

    def budget(self, step: float) -> int:
        return self._budget

    def take_over(self) -> None:
        self._copies.wait(self._steps.record())

    def pages(self, arena: Tensor, pages: Sequence[Piece]) -> int:
        for count, (offset, page) in enumerate(pages):
            staged = self._stage(page)
            if staged is None:
                return count
            self._copies.copy(arena[offset : offset + page.numel()], staged)
        return len(pages)

    def mark(self) -> Event:
        self._unseen = self._copies.record()
        self._ring.close(self._unseen)
        return self._unseen

    def write(self, target: Tensor, source: Tensor) -> bool:
        staged = self._stage(source)
        if staged is not None:
            self._steps.copy(target, staged)
            self._ring.close(self._steps.record())
        return staged is not None

    def fill(self, target: Tensor, value: float) -> None:
        self._steps.fill(target, value)

    def move(self, target: Tensor, source: Tensor) -> None:
        if self._unseen is not None:
            self._steps.wait(self._unseen)
            self._unseen = None
        self._steps.copy(target, source)

    def wait(self) -> None:
        self._ring.wait()

    def _stage(self, source: Tensor) -> Tensor | None:
        piece = self._ring.take(source.nbytes)
        if piece is None:
            return None
        staged = piece.view(source.dtype).view(source.shape)
        copy_serially(staged.view(-1), source.view(-1))
        return staged


def uploads_to(device: torch.device, largest: int) -> Uploads:
    """The way to `device`. largest: bytes of the largest page."""
    if device.type != "cuda":
        return AtOnce()
    nbytes = max(RING_BYTES, -(-largest // ALIGNMENT) * ALIGNMENT)
    staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return Beside(CudaStream(device), CudaStream(device, beside), staging)
