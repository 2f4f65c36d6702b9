"""Small tensors on their way to the device, without a wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x`, of the CPU, on `device`: on a GPU through pinned memory, behind what the current stream has to do.

    Torch keeps the pinned memory until the copy has run, and then for the next one.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
