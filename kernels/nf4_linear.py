"""Product with NF4 weights.

    y = x @ W.T (+ bias),   W[n, k] = code[q[n, k]] * absmax[(n * K + k) // 64]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.kernels import nf4
from lorry.kernels.nf4 import NF4Weight


class NF4Linear:
    """The weights of one or more linears that share their input, fused along N.

    parts: NF4 weights [N_i, K] of one K; bias: [sum of N_i] or None. Each part keeps its own absmax state.
    """

    def __init__(self, parts: Sequence[NF4Weight], bias: Tensor | None = None) -> None:
        if not parts:
            raise ValueError("parts must hold at least one NF4Weight")
        if len({part.shape[1] for part in parts}) != 1:
            raise ValueError(f"parts must share K, got shapes {[part.shape for part in parts]}")
        self.N = [part.shape[0] for part in parts]
        self.in_features = parts[0].shape[1]
        self.out_features = sum(self.N)
        self.nbytes = sum(part.nbytes for part in parts)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.bias = bias
        self._parts = list(parts)

    @property
    def parts(self) -> list[NF4Weight]:
        """The weights this was made of, bit for bit."""
        return self._parts

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K), bias not counted."""
        return 8 * self.nbytes / (self.out_features * self.in_features)


def nf4_linear_reference(x: Tensor, parts: Sequence[NF4Weight], bias: Tensor | None = None) -> Tensor:
    """x @ dequantize(W).T (+ bias); x [M, K] -> [M, sum of N] in x's dtype."""
    weight = torch.cat([nf4.dequantize(part, x.dtype) for part in parts])
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def nf4_linear(x: Tensor, weight: NF4Linear, out: Tensor | None = None) -> Tensor:
    """y = x @ W.T (+ bias).

    x: [M, K] float32, bfloat16 or float16; out: [M, N] of x's dtype to write to, or None for a new tensor.
    """
    y = nf4_linear_reference(x, weight.parts, weight.bias)
    return y if out is None else out.copy_(y)
