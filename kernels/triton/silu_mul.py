"""Gated activation on a GPU, fused with the LoRA sums of gate and up.

    gate <- gate + lora_gate,  up <- up + lora_up      each rounded to its dtype (only where a LoRA term is given)
    y = round(silu(gate)) * up                         silu in float32; rounded where torch rounds

**Plan.** A program is a tile of rows by some columns of both halves. With a LoRA term the tiles are those of its
routes, which cover the rows without adapters too; without, any rows.

Bound: the bytes of gate, up and y, and 64 I bytes for each distinct page pair. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.lora import LoraTerm
from lorry.kernels.triton.common import FUSION, rounded
from lorry.kernels.triton.lora import expand_arguments, expand_pair, output_vectors

TILE_ELEMENTS = 1024  # of a program: 8 a thread
LORA_TILE_ELEMENTS = 2048  # of a program with a LoRA term: 128 columns of 16 rows


@triton.jit(do_not_specialize=["linear", "rows", "capacity", "pages"])
def silu_mul_kernel(
    y, gate_up, tiles, rows, width, stride,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, COLUMNS columns)."""
    local = tl.arange(0, TILE_ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < width
    if SITES > 0:
        tile = tiles + tl.program_id(0) * 3
        start, count, segment = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    else:
        start = tl.program_id(0) * TILE_ROWS
        count = rows - start
    if count > 0:
        row_mask = local < count
        mask = row_mask[:, None] & column_mask[None, :]
        place = gate_up + start.to(tl.int64) * stride + local[:, None] * stride + columns[None, :]
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
        if SITES > 0:
            if segment >= 0:
                zeros = tl.zeros((TILE_ROWS, COLUMNS), tl.float32)
                lora_gate, lora_up = expand_pair(
                    zeros, zeros, start + local, row_mask, columns, column_mask, segment, width,
                    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
                    LINEARS, SITES, SPLITS,
                )  # fmt: skip
                gain, shift = output_vectors(
                    columns, column_mask, segment, 0, width, arena, page_offsets, page_scales, linear, pages, LINEARS
                )
                gate += gain[None, :] * gate + shift[None, :] + lora_gate
                gain, shift = output_vectors(
                    columns, column_mask, segment, 1, width, arena, page_offsets, page_scales, linear, pages, LINEARS
                )
                up += gain[None, :] * up + shift[None, :] + lora_up
            gate = rounded(gate, y.dtype.element_ty).to(tl.float32)
            up = rounded(up, y.dtype.element_ty).to(tl.float32)
        active = rounded(gate / (1.0 + tl.exp(-gate)), y.dtype.element_ty).to(tl.float32)
        out = y + start.to(tl.int64) * width + local[:, None] * width + columns[None, :]
        tl.store(out, rounded(active * up, y.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor, lora: LoraTerm | None = None) -> Tensor:
    """silu(gate) * up; gate_up [M, 2I], contiguous rows of any stride → [M, I]; lora: (gate, up), shrink done."""
    if gate_up.stride(1) != 1:
        raise ValueError(f"gate_up must have contiguous rows, got strides {gate_up.stride()}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return y
    if lora is None:
        tile_rows = min(8, triton.next_power_of_2(rows))
        columns, tiles, tile_count = TILE_ELEMENTS // tile_rows, None, triton.cdiv(rows, tile_rows)
    else:
        tile_rows = lora.routes.tile_rows
        columns = LORA_TILE_ELEMENTS // tile_rows
        tiles, tile_count = lora.routes.tiles, lora.routes.tile_count
    silu_mul_kernel[tile_count, triton.cdiv(width, columns)](
        y, gate_up, tiles, rows, width, gate_up.stride(0), **expand_arguments(lora),
        TILE_ROWS=tile_rows, COLUMNS=columns,
        num_warps=4, num_stages=1, **FUSION,
    )  # fmt: skip
    return y
