"""A floating-point checkpoint seen as an NF4 one: each linear is quantized at the moment when it is read."""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.kernels.nf4 import quantize
from lorry.server.model.weights import HEAD, Checkpoint, CheckpointView, LinearWeight


class QuantizingCheckpoint(CheckpointView):
    """`Checkpoint` whose linears (the output head excepted, as in bitsandbytes) are quantize(w): blocks of 64, double
    quantization, dequantizing to the dtype in which the weight was stored. At most one linear is in memory as float.

    everywhere_alike: the same bits on every machine, for sources that nobody can have quantized with bitsandbytes.
    """

    def __init__(self, source: Checkpoint, device: torch.device | str = "cpu", everywhere_alike: bool = False) -> None:
        super().__init__(source)
        self._device = device
        self._tables_in = torch.float64 if everywhere_alike else torch.float32

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        weight = super().linear(module, shape)
        if module == HEAD or not isinstance(weight, Tensor):
            return weight
        return quantize(weight.to(self._device), tables_in=self._tables_in)
