"""Between the host and a device, without a wait: one copy there, copies and one event back.

On a GPU both ends of a copy on the host are pinned. torch keeps pinned memory that was given back for the next one who
asks, and knows by its own events when a copy has left it. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes; Triton compiles a kernel anew for pointers that are aligned otherwise


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device, into: Tensor | None = None) -> list[Tensor]:
    """The arrays on the device: aligned views of one buffer, which one copy fills behind what the stream has to do.

    arrays: contiguous; any shapes and types that torch knows. into: the buffer, uint8, `packed_bytes(arrays)` or more;
    None: a new one
    """
    ends = np.cumsum([0, *map(_room, arrays)]).tolist()
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    packed = host.numpy()
    places = [slice(start, start + array.nbytes) for start, array in zip(ends, arrays, strict=False)]
    for place, array in zip(places, arrays, strict=True):
        packed[place] = array.reshape(-1).view(np.uint8)
    if into is None:
        buffer = host.to(device, non_blocking=True)
    else:
        buffer = into[: ends[-1]].copy_(host, non_blocking=True)
    return [
        buffer[place].view(torch.from_numpy(array).dtype).view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]


def packed_bytes(arrays: Iterable[NDArray[Any]]) -> int:
    """Of a buffer that holds all of them."""
    return sum(map(_room, arrays))


def _room(array: NDArray[Any]) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT


class Readback:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._copies = list(tensors)
            return
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host, as soon as what was enqueued before them is done; nothing later is waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
