"""Root-mean-square norm on a GPU, with what comes before it: the LoRA sum of the product that made x, the residual.

    x <- x + lora                    rounded to x's dtype (only where a LoRA term is given)
    residual <- residual + x         rounded to its dtype (only where a residual is given), then normed in x's stead
    y = round(x / sqrt(mean(x**2) + eps)) * weight

All sums are float32; rounded is what the reference rounds: each line above, and the normalized value before the weight.

**Plan.** A program is one row, or several where rows are short (heads). With a LoRA term it reads all of B for its
row, 16 D elements of each page: rows that share an adapter read it from the L2 cache. Splitting a row over programs
would need a meeting of these before the norm, which costs about what it saves (calculated). Meant for decoding: long
batches add LoRA by `lora_expand`, whose tiles read B once for 64 rows.

Bound: the bytes of x, residual (twice) and y, and 32 D bytes for each distinct page. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.lora import LoraTerm
from lorry.kernels.triton.common import FUSION, rounded
from lorry.kernels.triton.lora import expand_arguments, expand_row, output_vectors

PROGRAM_ELEMENTS = 1024  # of short rows that share a program
HELD_ELEMENTS = 1 << 15  # of B that a program holds in registers at a time: 64 a thread of 512


@triton.jit(do_not_specialize=["linear", "rows", "capacity", "pages"])
def rms_norm_kernel(
    y, x, weight, residual, row_segment, rows, inner, stride_outer, stride_inner, stride_residual, eps,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows (i, j) of x [outer, inner, WIDTH]; with a LoRA term ROWS is 1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    column = columns[None, :]
    mask = (row < rows) & inside[None, :]
    at = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    value = tl.load(x + at + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row.to(tl.int64) * stride_residual + column
        stream = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if SITES > 0:
        only = tl.program_id(0)
        term = expand_row(
            tl.zeros((BLOCK,), tl.float32), only, columns, inside, tl.load(row_segment + only), 0, WIDTH,
            arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
            LINEARS, SITES, SPLITS, GROUP,
        )  # fmt: skip
        gain, shift = output_vectors(
            column, inside[None, :], tl.load(row_segment + only), 0, WIDTH,
            arena, page_offsets, page_scales, linear, pages, LINEARS,
        )  # fmt: skip
        value = rounded(value + (gain * value + shift + term[None, :]), x.dtype.element_ty).to(tl.float32)
    if HAS_RESIDUAL:
        updated = rounded(stream + value, residual.dtype.element_ty)
        tl.store(place, updated, mask=mask)
        value = updated.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)[:, None]
    factor = tl.load(weight + column, mask=inside[None, :], other=0.0).to(tl.float32)
    normed = rounded(value * scale, y.dtype.element_ty).to(tl.float32)
    tl.store(y + row.to(tl.int64) * WIDTH + column, rounded(factor * normed, y.dtype.element_ty), mask=mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, lora: LoraTerm | None = None
) -> Tensor:
    """y = x / sqrt(mean(x**2) + eps) * weight → contiguous [..., D]; residual [..., D] is updated.

    x: [M, D] or [M, heads, D], the last dimension contiguous; of more dimensions, contiguous. residual: of x's shape
    and dtype, contiguous but for the stride of its rows. lora: one site, whose shrink is done, for x [M, D].
    """
    if x.stride(-1) != 1 or not weight.is_contiguous() or (residual is not None and residual.stride(-1) != 1):
        raise ValueError("the last dimension of x, weight and residual must be contiguous")
    if x.dim() == 3:
        outer, inner, width = x.shape
        stride_outer, stride_inner, _ = x.stride()
    else:
        flat = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        (outer, width), inner, stride_outer, stride_inner = flat.shape, 1, flat.stride(0), 0
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = outer * inner
    if rows == 0:
        return y
    if residual is not None and residual.dim() != 2:
        residual = residual.view(rows, width)
    block = triton.next_power_of_2(width)
    rows_each = 1 if lora is not None else max(1, PROGRAM_ELEMENTS // block)
    rms_norm_kernel[(triton.cdiv(rows, rows_each),)](
        y, x, weight, residual, None if lora is None else lora.routes.row_segment,
        rows, inner, stride_outer, stride_inner, 0 if residual is None else residual.stride(0), eps,
        **expand_arguments(lora), WIDTH=width, BLOCK=block, ROWS=rows_each,
        GROUP=min(16, max(1, HELD_ELEMENTS // block)), HAS_RESIDUAL=residual is not None,
        num_warps=_warps(rows_each * block, lora is not None), num_stages=1, **FUSION,
    )  # fmt: skip
    return y


def _warps(elements: int, lora: bool) -> int:
    """8 elements a thread, so that a row's loads are all under way at once; not yet measured on a GPU."""
    return max(1, min(16 if lora else 8, elements // 256))
