"""Gated activation of the Llama family's feed-forward layer.

y = silu(gate) * up,  silu(g) = g / (1 + exp(-g)),  gate, up = gate_up.chunk(2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.kernels import dispatch, native
from lorry.kernels.lora import LoraTerm


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate_up [M, 2I], gate first -> [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul(gate_up: Tensor, lora: LoraTerm | None = None) -> Tensor:
    """silu(gate) * up; gate_up: [M, 2I] with the gate in the first I columns -> [M, I] in the same dtype.

    lora: on a GPU, the LoRA sums of (gate, up) that are still to be added, their shrink done; gate_up itself stays.
    """
    if dispatch.on_gpu(gate_up):
        from lorry.kernels.triton import silu_mul as gpu

        return gpu.silu_mul(gate_up, lora)
    assert lora is None, "only a GPU kernel finishes a LoRA sum"
    library = native.library()
    fits = gate_up.dtype is torch.float32 and gate_up.is_cpu and gate_up.stride()[1] == 1
    if library is None or not fits:
        return silu_mul_reference(gate_up)
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, columns)
    library.silu_mul(gate_up.data_ptr(), rows, gate_up.stride()[0], columns, y.data_ptr())
    return y
