"""A step's tensors on their way to the device: all of them in one copy that nobody waits for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lorry.kernels import transfer
from lorry.server.model.inputs import ModelInputs

_SEGMENTS = ("segments", "logits_segments", "tap_segments")


def tensors_of(inputs: ModelInputs) -> dict[str, Tensor]:
    """The tensors of a step by name, those of its segments behind a prefix."""
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    for name in _SEGMENTS:
        if (segments := found[name]) is not None:
            found |= {f"{name}.{field.name}": getattr(segments, field.name) for field in fields(segments)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def upload(inputs: ModelInputs, device: torch.device, into: Tensor | None = None) -> ModelInputs:
    """A step of the CPU on the device. into: the memory that its tensors are to lie in, uint8."""
    tensors = tensors_of(inputs)
    arrived = transfer.to_device([tensor.contiguous().numpy() for tensor in tensors.values()], device, into)
    return _with_tensors(inputs, dict(zip(tensors, arrived, strict=True)))


def packed_bytes(inputs: ModelInputs) -> int:
    """Of the memory that `upload` copies into."""
    return transfer.packed_bytes(tensor.numpy() for tensor in tensors_of(inputs).values())


def _with_tensors(inputs: ModelInputs, tensors: dict[str, Tensor]) -> ModelInputs:
    own: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    for part in _SEGMENTS:
        if (segments := getattr(inputs, part)) is not None:
            fields_of: dict[str, Any] = {
                name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(part + ".")
            }
            own[part] = replace(segments, **fields_of)
    return replace(inputs, **own)
