"""How a step's tensors reach the device: packed into one pinned buffer, in one copy that nobody waits for.

host buffer:  | token_ids · | positions · | … | segments.weights · |     each at a multiple of ALIGNMENT bytes
                   one copy, behind the steps that are under way
device:       | the same    |                                            tensors are views of it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lorry.server.model.inputs import ModelInputs

ALIGNMENT = 16  # bytes
BUFFERS = 3  # a buffer is written again when the step that it was copied for has ended: two steps are under way at most
LEAST_BYTES = 1 << 16


def tensors_of(inputs: ModelInputs) -> dict[str, Tensor]:
    """The tensors of a step by name, those of its segments with a prefix."""
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    if inputs.segments is not None:
        found |= {f"segments.{field.name}": getattr(inputs.segments, field.name) for field in fields(inputs.segments)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def with_tensors(inputs: ModelInputs, tensors: dict[str, Tensor]) -> ModelInputs:
    """The same step with other tensors."""
    own: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    of_segments: dict[str, Any] = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if "." in name}
    segments = None if inputs.segments is None else replace(inputs.segments, **of_segments)
    return replace(inputs, segments=segments, **own)


def packed_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of a buffer that holds all of them."""
    return sum(_room(tensor) for tensor in tensors.values())


def views(tensors: dict[str, Tensor], buffer: Tensor) -> dict[str, Tensor]:
    """Tensors of the same names, shapes and dtypes, one behind the other in `buffer`, uint8 [packed_bytes]."""
    return {name: view for (name, _), view in zip(tensors.items(), _views(tensors, buffer), strict=True)}


def _views(tensors: dict[str, Tensor], buffer: Tensor) -> Iterator[Tensor]:
    start = 0
    for tensor in tensors.values():
        yield buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)


def _room(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT


class Staging:
    """Pinned buffers, used in turn. On a CPU `upload` only copies, for tests of what comes after it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._hosts = [self._host(LEAST_BYTES) for _ in range(BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._turn = 0

    def upload(self, inputs: ModelInputs, target: Tensor | None = None) -> ModelInputs:
        """The same step on the device, in `target`, uint8, or in memory of its own."""
        tensors = tensors_of(inputs)
        nbytes = packed_bytes(tensors)
        self._turn = (self._turn + 1) % BUFFERS
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()  # long past: see BUFFERS
        if self._hosts[self._turn].numel() < nbytes:
            self._hosts[self._turn] = self._host(1 << (nbytes - 1).bit_length())
        host = self._hosts[self._turn]
        for view, tensor in zip(_views(tensors, host), tensors.values(), strict=True):
            view.copy_(tensor)
        if target is None:
            target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        target[:nbytes].copy_(host[:nbytes], non_blocking=True)
        if self._on_gpu:
            event = self._copied[self._turn] = copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return with_tensors(inputs, views(tensors, target))

    def _host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._on_gpu)
