"""Many pieces of memory copied at once: the pages of an adapter on their way into the arena.

    target[offset_i : offset_i + n_i] ← piece_i

In the calling thread alone, without the interpreter's lock: waking the others for a page costs more than to copy it
(10 MB of adapters on two busy cores: 390 ms of processor time with all threads, 35 ms in pieces by torch).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from lorry.kernels import native

Piece = tuple[int, Tensor]
"""Where it goes, in elements of the target, and what it is."""

_SERIAL = 1 << 15  # elements that torch copies in one thread


def copy_serially(target: Tensor, source: Tensor) -> None:
    """target ← source, flat and of one dtype and length, in this thread."""
    for start in range(0, target.numel(), _SERIAL):
        target[start : start + _SERIAL].copy_(source[start : start + _SERIAL])


def copy_pieces_reference(target: Tensor, pieces: Sequence[Piece]) -> None:
    """As below, piece by piece."""
    for offset, piece in pieces:
        copy_serially(target[offset : offset + piece.numel()], piece)


def copy_pieces(target: Tensor, pieces: Sequence[Piece]) -> None:
    """target and pieces: flat, contiguous, of one dtype and in host memory; no piece lies in target.

    Raises ValueError for another dtype, and for a piece that would lie beyond the target, before anything is copied.
    """
    width, dtype, room = target.itemsize, target.dtype, target.numel()
    offsets, sources, sizes = array("q"), array("Q"), array("q")
    for offset, piece in pieces:
        count = piece.numel()
        if piece.dtype != dtype or not piece.is_contiguous():
            raise ValueError(f"contiguous {dtype} is expected, not {piece.dtype} of strides {piece.stride()}")
        if not 0 <= offset <= room - count:
            raise ValueError(f"{count} elements at {offset} do not lie within {room}")
        offsets.append(offset * width)
        sources.append(piece.data_ptr())
        sizes.append(count * width)
    library = native.library()
    if library is None:
        copy_pieces_reference(target, pieces)
        return
    places = (each.buffer_info()[0] for each in (offsets, sources, sizes))
    native.check(library.copy_pieces(target.data_ptr(), *places, len(sizes)))
