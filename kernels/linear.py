"""Product with dense 16- or 32-bit weights (language-model head) and rows of them (token embedding).

    y = x @ W.T (+ bias), float32 accumulation;   embedding[t] = W[token_ids[t]]
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.kernels.nf4 import FLOAT_DTYPES


class DenseLinear:
    """A weight [N, K] in bfloat16, float16 or float32 with an optional bias [N].

    A tied embedding and head share one DenseLinear, hence one copy in memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES:
            raise ValueError(f"weight must be [N, K] bf16, fp16 or fp32, got {weight.dtype} {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.dtype = weight.dtype
        self.nbytes = weight.numel() * weight.element_size()
        self.bias = bias
        self._weight = weight

    @property
    def weight(self) -> Tensor:
        """[N, K] as given."""
        return self._weight

    def row(self, ids: Tensor) -> Tensor:
        """W[ids] -> [T, K] in the weight's dtype; ids int64 [T]."""
        return self._weight[ids]


def dense_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T (+ bias) in float32, rounded to x's dtype; x [M, K], weight [N, K]."""
    y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


def dense_linear(x: Tensor, weight: DenseLinear) -> Tensor:
    """y = x @ W.T (+ bias); x: [M, K] -> [M, N] in x's dtype, accumulated in float32."""
    return dense_linear_reference(x, weight.weight, weight.bias)


def embed(token_ids: Tensor, weight: DenseLinear, dtype: torch.dtype) -> Tensor:
    """W[token_ids] -> [T, K] in dtype; token_ids: int64 [T]."""
    return weight.row(token_ids).to(dtype)
