"""Gated activation of the Llama family's feed-forward layer.

    y = silu(gate) * up,  silu(g) = g / (1 + exp(-g)),  gate, up = gate_up.chunk(2)
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate_up [M, 2I], gate first -> [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate_up: [M, 2I] with the gate in the first I columns -> [M, I] in the same dtype."""
    return silu_mul_reference(gate_up)
