"""Product with dense 16- or 32-bit weights (language-model head) and rows of them (token embedding).

y = x @ W.T (+ bias), float32 accumulation;   embedding[t] = W[token_ids[t]]
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lorry.kernels import native
from lorry.kernels.nf4 import FLOAT_DTYPES

TILE = 16  # output columns that lie side by side in memory


class DenseLinear:
    """A weight [N, K] in bfloat16, float16 or float32 with an optional bias [N].

    A tied embedding and head share one DenseLinear, hence one copy in memory. On a CPU with the native kernels it is
    kept as [ceil(N/16), K, 16], the last tile zero-padded, and the tensor given is not held.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES:
            raise ValueError(f"weight must be [N, K] of {FLOAT_DTYPES}, got {weight.dtype} {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.dtype = weight.dtype
        self.nbytes = weight.numel() * weight.element_size()
        self.bias = bias
        self.native = native.library() is not None and weight.is_cpu
        if not self.native:
            self._weight = weight
            return
        tiles = -(-self.out_features // TILE)
        whole = self.out_features // TILE
        self._weight = torch.zeros(tiles, self.in_features, TILE, dtype=weight.dtype)
        self._weight[:whole] = weight.detach()[: whole * TILE].reshape(whole, TILE, self.in_features).transpose(1, 2)
        if whole < tiles:
            self._weight[whole, :, : self.out_features - whole * TILE] = weight.detach()[whole * TILE :].T
        self._wide_bias = None if bias is None else bias.float().contiguous()
        self._c_part = native.Part(words=self._weight.data_ptr(), tiles=tiles)
        self._c_linear = native.Linear(
            ctypes.addressof(self._c_part),
            1,
            self.in_features,
            self.out_features,
            tiles,
            None if self._wide_bias is None else self._wide_bias.data_ptr(),
            None,
            None,
            0.0,
            native.ELEMENT_TYPES[weight.dtype],
        )
        self.plan = ctypes.addressof(self._c_linear)

    @property
    def weight(self) -> Tensor:
        """[N, K] as given."""
        if not self.native:
            return self._weight
        return self._weight.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()

    def row(self, ids: Tensor) -> Tensor:
        """W[ids] -> [T, K] in the weight's dtype; ids int64 [T]."""
        return embed(ids, self, self.dtype)


def dense_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T (+ bias) in float32, rounded to x's dtype; x [M, K], weight [N, K]."""
    y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


def dense_linear(x: Tensor, weight: DenseLinear) -> Tensor:
    """y = x @ W.T (+ bias); x: [M, K] -> [M, N] in x's dtype, accumulated in float32."""
    if x.shape[1] != weight.in_features:
        raise ValueError(f"x must be [M, {weight.in_features}], got {list(x.shape)}")
    if x.is_cuda and x.dtype is weight.dtype:  # cuBLAS accumulates in float32
        return torch.nn.functional.linear(x, weight.weight, None if weight.bias is None else weight.bias.to(x.dtype))
    library = native.library()
    if library is None or not weight.native:
        return dense_linear_reference(x, weight.weight, weight.bias)
    wide = x if x.dtype is torch.float32 and x.stride()[1] == 1 else x.float().contiguous()
    y = torch.empty(wide.shape[0], weight.out_features)
    status = library.linear_forward(
        weight.plan, wide.data_ptr(), wide.shape[0], wide.stride()[0], y.data_ptr(), weight.out_features
    )
    native.check(status)
    return y.to(x.dtype)


def embed_reference(token_ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight[token_ids] -> [T, K] in dtype; weight [N, K]."""
    return weight[token_ids].to(dtype)


def embed(token_ids: Tensor, weight: DenseLinear, dtype: torch.dtype) -> Tensor:
    """W[token_ids] -> [T, K] in dtype; token_ids: int64 [T], each below N (IndexError otherwise)."""
    library = native.library()
    if library is None or not weight.native:
        return embed_reference(token_ids, weight.weight, dtype)
    ids = token_ids.contiguous()
    rows = torch.empty(ids.shape[0], weight.in_features)
    status = library.linear_rows(weight.plan, ids.data_ptr(), ids.shape[0], rows.data_ptr())
    if status:
        raise IndexError(f"token_ids must be below {weight.out_features}")
    return rows.to(dtype)
