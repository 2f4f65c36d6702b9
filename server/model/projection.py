"""Linears that share their input, fused along N: y = [x W_1ᵀ + b_1 | x W_2ᵀ + b_2 | …].

NF4 parts become one NF4Linear, floating-point parts (modules that a checkpoint kept out of quantization) one
DenseLinear. A mix of both keeps one product per run of equal kind, so that the layer code need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from lorry.kernels.linear import DenseLinear, dense_linear
from lorry.kernels.lora import LoraTerm, lora_shrink
from lorry.kernels.nf4 import NF4Weight, dequantize
from lorry.kernels.nf4_linear import NF4Linear, Products, nf4_linear
from lorry.server.model.placement import Placement, tables_of
from lorry.server.model.weights import LinearWeight


class Projection:
    """`weights`: [N_i, K] each; `biases`: [N_i] or None each; `dense_dtype`: dtype to keep dense weights in, or
    None for the dtype in which they are stored; `products`: of NF4Linear. `project(x [M, K])` gives [M, ΣN]."""

    def __init__(
        self,
        weights: Sequence[LinearWeight],
        biases: Sequence[Tensor | None] | None = None,
        dense_dtype: torch.dtype | None = None,
        products: Products = "float32",
    ) -> None:
        pairs = list(zip(weights, biases or [None] * len(weights), strict=True))
        self.pieces: list[NF4Linear | DenseLinear] = []
        self._sizes: list[list[int]] = []  # N_i of each piece
        for _, run in groupby(pairs, key=lambda pair: _kind(pair[0])):
            group = list(run)
            nf4 = [weight for weight, _ in group if isinstance(weight, NF4Weight)]
            dense = [weight for weight, _ in group if isinstance(weight, Tensor)]
            bias = _fused_bias(group)
            joined = NF4Linear(nf4, bias, products) if nf4 else DenseLinear(_joined(dense, dense_dtype), bias)
            self.pieces.append(joined)
            self._sizes.append([weight.shape[0] for weight, _ in group])
        self.nf4_weights = sum(w.shape[0] * w.shape[1] for w in weights if isinstance(w, NF4Weight))
        self.tables = [table for w in weights if isinstance(w, NF4Weight) for table in tables_of(w)]
        self.parameters = sum(w.shape[0] * w.shape[1] for w in weights)
        self.parameters += sum(bias.numel() for _, bias in pairs if bias is not None)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights in floating point and of the biases."""
        dense = sum(piece.nbytes for piece in self.pieces if isinstance(piece, DenseLinear))
        return dense + sum(piece.bias.nbytes for piece in self.pieces if piece.bias is not None)

    def part(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight [N_i, K], dequantized, and bias [N_i] or None of one of the linears, float32 copies in host memory."""
        number = 0
        while index >= len(self._sizes[number]):
            index -= len(self._sizes[number])
            number += 1
        piece, sizes = self.pieces[number], self._sizes[number]
        rows = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        if isinstance(piece, NF4Linear):
            weight = dequantize(_in_host_memory(piece.parts[index]), torch.float32)
        else:
            weight = piece.weight[rows].to("cpu", torch.float32, copy=True)
        return weight, None if piece.bias is None else piece.bias[rows].to("cpu", torch.float32, copy=True)

    def project(self, x: Tensor, shrink: LoraTerm | None = None) -> Tensor:
        """x [M, K] → [M, ΣN] in x's dtype; on a GPU the first half of a LoRA term of the same x is done on the side."""
        first, *others = self.pieces
        y = _apply(x, first, shrink)
        return torch.cat([y, *(_apply(x, piece) for piece in others)], dim=1) if others else y


def nf4_bytes(projections: Sequence[Projection]) -> int:
    """Bytes held for all NF4 weights together, a table that several share counted once."""
    tables = [table for projection in projections for table in projection.tables]
    shared = sum(table.nbytes for table in {id(table): table for table in tables}.values())
    pieces = [piece for projection in projections for piece in projection.pieces if isinstance(piece, NF4Linear)]
    return sum(piece.nbytes for piece in pieces) - sum(table.nbytes for table in tables) + shared


def _apply(x: Tensor, piece: NF4Linear | DenseLinear, shrink: LoraTerm | None = None) -> Tensor:
    if isinstance(piece, NF4Linear):
        return nf4_linear(x, piece, shrink=shrink)
    if shrink is not None:
        lora_shrink(x, shrink)
    return dense_linear(x, piece)


def _in_host_memory(weight: NF4Weight) -> NF4Weight:
    placed = Placement(torch.device("cpu")).place(weight)
    assert isinstance(placed, NF4Weight)
    return placed


def _kind(weight: LinearWeight) -> tuple[object, ...]:
    """Weights of equal kind can be fused."""
    if isinstance(weight, NF4Weight):
        return ("nf4", weight.blocksize, weight.nested_absmax is not None, weight.nested_blocksize, weight.dtype)
    return ("dense", weight.dtype)


def _joined(weights: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    joined = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return joined if dtype is None else joined.to(dtype)


def _fused_bias(group: Sequence[tuple[LinearWeight, Tensor | None]]) -> Tensor | None:
    if all(bias is None for _, bias in group):
        return None
    device = next(bias.device for _, bias in group if bias is not None)
    return torch.cat(
        [torch.zeros(weight.shape[0], device=device) if bias is None else bias.float() for weight, bias in group]
    )
