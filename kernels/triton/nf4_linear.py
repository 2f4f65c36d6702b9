"""y = x @ W.T (+ bias) with NF4 weights on a GPU.

W lies as `nf4_fragments` says: a tile is decoded in the registers from which the tensor cores read it.

**Decoding.** The 16 codes are split into high and low bytes, four to a register; a byte permutation selects with three
bits of four nibbles at a time, a second one with their fourth bits: two permutations for each weight, 2.6 integer
operations in all (`_DECODE`).

**Plans**, by M, the rows of x. In skinny and mid a row has the same bits whatever the other rows are, in prefill
whatever cuBLAS gives it for this M:

- skinny, M to 64: K is split over programs, the last to arrive sums the parts in their order. Rounded to x's dtype: the
  16 codes. absmax multiplies in float32 what was summed over its 64 columns.
- mid, M to 512: the same kernel with larger tiles of x; the same roundings.
- prefill, beyond: slabs of W, dequantized as `nf4.dequantize` does, bit for bit, multiplied by cuBLAS. Rounded to x's
  dtype: each weight, hence as bitsandbytes.

Bound: N K (4 + 8/64 + 32/(64 * 256)) / 8 bytes, or 2 M N K operations. Not yet measured on a GPU: all tiles, splits
and crossovers below are calculated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.lora import LoraTerm
from lorry.kernels.triton.common import FUSION, INTERPRET, dot, rounded
from lorry.kernels.triton.lora import lora_shrink, shrink_arguments, shrink_programs, shrink_tile
from lorry.kernels.triton.nf4_fragments import COUNTERS, UNITS, Fragments

STAGES = 3  # iterations whose loads are under way
SKINNY_ROWS, MID_ROWS = 64, 512  # most rows of x of these plans

_DECODE = tl.constexpr(
    """
    {
    .reg .b32 m, m1, ix, i1, a, b, hh, ll;
    and.b32 m, $4, 0x77777777;
    shr.u32 ix, $4, 1;
    lop3.b32 ix, ix, 0x44444444, 0x32103210, 0xEA;
    shr.u32 m1, m, 16;
    shr.u32 i1, ix, 16;
    prmt.b32 a, $5, $9, m;
    prmt.b32 b, $13, $17, m;
    prmt.b32 hh, a, b, ix;
    prmt.b32 a, $21, $25, m;
    prmt.b32 b, $29, $33, m;
    prmt.b32 ll, a, b, ix;
    prmt.b32 $0, ll, hh, 0x7351;
    prmt.b32 $2, ll, hh, 0x6240;
    prmt.b32 a, $5, $9, m1;
    prmt.b32 b, $13, $17, m1;
    prmt.b32 hh, a, b, i1;
    prmt.b32 a, $21, $25, m1;
    prmt.b32 b, $29, $33, m1;
    prmt.b32 ll, a, b, i1;
    prmt.b32 $1, ll, hh, 0x7351;
    prmt.b32 $3, ll, hh, 0x6240;
    }
    """
)
_DECODE_OPERANDS = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 32)


@triton.jit
def _table(tables, index: tl.constexpr):
    """Register `index` of the code tables as [1, 32, 1]. Each lane reads its own copy: what all lanes read alike would
    lie in a uniform register, and every permutation would first copy it into an ordinary one."""
    return tl.load(tables + index * 32 + tl.arange(0, 32))[None, :, None]


@triton.jit
def _decode(bytes, t, dtype: tl.constexpr):
    """uint8 [..] of two codes each → their values (high nibbles, low nibbles), [..] each; t: the eight `_table`s."""
    if INTERPRET:
        wide = bytes.to(tl.int32)
        return _look_up(wide >> 4, t, dtype), _look_up(wide & 15, t, dtype)
    else:
        operands = [bytes, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]]
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _DECODE, _DECODE_OPERANDS, operands, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _DECODE, _DECODE_OPERANDS, operands, dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )


@triton.jit
def _look_up(code, t, dtype: tl.constexpr):
    """What `_DECODE` does, for the interpreter; float32 stands for bfloat16 there."""
    quad, shift = code >> 2, (code & 3) * 8
    high = tl.where(quad < 2, tl.where(quad == 0, t[0], t[1]), tl.where(quad == 2, t[2], t[3]))
    low = tl.where(quad < 2, tl.where(quad == 0, t[4], t[5]), tl.where(quad == 2, t[6], t[7]))
    bits = ((high >> shift) & 255) << 8 | ((low >> shift) & 255)
    if dtype == tl.bfloat16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _rows_by_columns(values, UNITS: tl.constexpr, LANE_COLUMNS: tl.constexpr):
    """[UNITS, 32, 16] in the order of a unit → [16 * UNITS, 32], a renaming of registers."""
    axes = tl.reshape(values, (UNITS, 8, 4, 2, 2, 2, 2))  # unit, g, q, s, j, h, e
    if LANE_COLUMNS == 2:
        axes = tl.permute(axes, (0, 5, 1, 3, 4, 2, 6))  # k = s, j, q, e
    else:
        axes = tl.permute(axes, (0, 5, 1, 3, 2, 4, 6))  # k = s, q, j, e
    return tl.reshape(axes, (UNITS * 16, 32))


@triton.jit
def _nested(nested_absmax, block, mask, NESTED_SHIFT: tl.constexpr):
    """float32 scale of the group of absmax codes that hold `block`, a number in the checkpoint's order; or 1."""
    if NESTED_SHIFT >= 0:
        return tl.load(nested_absmax + (block >> NESTED_SHIFT), mask=mask, other=0.0)
    else:
        return tl.where(mask, 1.0, 0.0)


@triton.jit
def _absmax(absmax, nested_code, nested, offset, mask, NESTED_SHIFT: tl.constexpr):
    """float32 absmax at the places `absmax`; nested: what `_nested` gave for them."""
    value = tl.load(absmax, mask=mask, other=0)
    if NESTED_SHIFT >= 0:
        value = tl.where(mask, tl.load(nested_code + value.to(tl.int32)) * nested + offset, 0.0)
    return value


@triton.jit(do_not_specialize=["M", "shrinks", "linear", "capacity", "pages"])
def nf4_linear_kernel(
    y, x, units, absmax, nested_absmax, nested_code, tables, w_tiles, parts, offsets, bias, split_sums, arrived,
    M, N, blocks, blocks_per_split, stride_x, stride_y,
    UNITS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, SPLITS_OF_K: tl.constexpr,
    LANE_COLUMNS: tl.constexpr, NESTED_SHIFT: tl.constexpr, ROW_IN_GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    shrinks, tiles, arena, page_offsets, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first `shrinks` programs are those of `lora.shrink_tile` for the same x, the others those of `_product`."""
    program = tl.program_id(0)
    if SITES > 0:
        if program < shrinks:
            shrink_tile(
                program, x, stride_x, tiles, arena, page_offsets, partial, linear, capacity, pages, in_features,
                LINEARS, SITES, SPLITS, TILE_ROWS, STEP, STAGES,
            )  # fmt: skip
            return
        program -= shrinks
    _product(
        program, y, x, units, absmax, nested_absmax, nested_code, tables, w_tiles, parts, offsets,
        bias, split_sums, arrived, M, N, blocks, blocks_per_split, stride_x, stride_y,
        UNITS, ROWS, UNROLL, SPLITS_OF_K, STAGES, LANE_COLUMNS, NESTED_SHIFT, ROW_IN_GROUP, HAS_BIAS,
    )  # fmt: skip


@triton.jit
def _product(
    program, y, x, units, absmax, nested_absmax, nested_code, tables, w_tiles, parts, offsets,
    bias, split_sums, arrived, M, N, blocks, blocks_per_split, stride_x, stride_y,
    UNITS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, SPLITS_OF_K: tl.constexpr, STAGES: tl.constexpr,
    LANE_COLUMNS: tl.constexpr, NESTED_SHIFT: tl.constexpr, ROW_IN_GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """program: (rows of x, split of K, tile of W) in one, the first the fastest."""
    row_tiles = tl.cdiv(M, ROWS)
    row_tile, split = program % row_tiles, program // row_tiles % SPLITS_OF_K
    tile = program // row_tiles // SPLITS_OF_K
    first = tl.load(w_tiles + 2 * tile)  # row of W
    part = tl.load(w_tiles + 2 * tile + 1)
    part_start, part_end = tl.load(parts + 3 * part), tl.load(parts + 3 * part + 1)
    nested_absmax += tl.load(parts + 3 * part + 2)
    nested_code += part * 256
    offset = tl.load(offsets + part)

    high_bytes = _table(tables, 0), _table(tables, 1), _table(tables, 2), _table(tables, 3)
    low_bytes = _table(tables, 4), _table(tables, 5), _table(tables, 6), _table(tables, 7)
    unit = first // 16 + tl.arange(0, UNITS)[:, None, None]
    byte = tl.arange(0, 32)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    unit_bytes = units + unit.to(tl.int64) * blocks * 512 + byte
    n = first + tl.arange(0, UNITS * 16)
    n_mask = n < part_end
    m = row_tile * ROWS + tl.arange(0, ROWS)
    m_mask = m < M
    x_rows = x + m.to(tl.int64)[:, None] * stride_x + tl.arange(0, 32)[None, :]

    # Where a row's blocks lie in one group of nested absmax, its scale is read once.
    nested = _nested(nested_absmax, (n - part_start) * blocks, n_mask, NESTED_SHIFT)
    end = tl.minimum((split + 1) * blocks_per_split, blocks)
    total = tl.zeros((UNITS * 16, ROWS), tl.float32)
    for start in tl.range(split * blocks_per_split, end, UNROLL, num_stages=STAGES):
        for step in tl.static_range(UNROLL):
            block = start + step
            rows_inside, columns_inside = tl.where(block < end, part_end, 0), tl.where(block < end, M, 0)
            inside = n < rows_inside
            packed = tl.load(unit_bytes + block * 512, mask=unit * 16 < rows_inside, other=0)
            high, low = _decode(packed, high_bytes + low_bytes, x.dtype.element_ty)
            x_high = tl.load(x_rows + block * 64, mask=m[:, None] < columns_inside, other=0.0)
            x_low = tl.load(x_rows + block * 64 + 32, mask=m[:, None] < columns_inside, other=0.0)
            sums = tl.zeros((UNITS * 16, ROWS), tl.float32)
            sums = dot(_rows_by_columns(high, UNITS, LANE_COLUMNS), x_high.T, sums)
            sums = dot(_rows_by_columns(low, UNITS, LANE_COLUMNS), x_low.T, sums)
            if not ROW_IN_GROUP:
                nested = _nested(nested_absmax, (n - part_start) * blocks + block, inside, NESTED_SHIFT)
            place = absmax + block.to(tl.int64) * N + n
            total += sums * _absmax(place, nested_code, nested, offset, inside, NESTED_SHIFT)[:, None]

    out_mask = n_mask[:, None] & m_mask[None, :]
    if SPLITS_OF_K > 1:
        place = m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(split_sums + split.to(tl.int64) * M * N + place, total, mask=out_mask)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        counter = arrived + tile * row_tiles + row_tile
        last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS_OF_K - 1
        if last:
            total = tl.zeros((UNITS * 16, ROWS), tl.float32)
            for other in range(SPLITS_OF_K):
                other_sums = split_sums + tl.cast(other, tl.int64) * M * N + place
                total += tl.load(other_sums, mask=out_mask, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)  # for the next launch
            _finish(y, total, bias, n, n_mask, m, out_mask, stride_y, HAS_BIAS)
    else:
        _finish(y, total, bias, n, n_mask, m, out_mask, stride_y, HAS_BIAS)


@triton.jit
def _finish(y, total, bias, n, n_mask, m, out_mask, stride_y, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n_mask, other=0.0)[:, None]
    tl.store(y + m.to(tl.int64)[None, :] * stride_y + n[:, None], rounded(total, y.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["first_tile", "first_row"])
def dequantize_kernel(
    out, units, absmax, nested_absmax, nested_code, codes, tiles, parts, offsets, first_tile, first_row,
    N, blocks, UNITS: tl.constexpr, LANE_COLUMNS: tl.constexpr, NESTED_SHIFT: tl.constexpr,
):  # fmt: skip
    """out[n - first_row, k] = round(code * absmax), program (block of 64 columns, tile of W)."""
    block, tile = tl.program_id(0), first_tile + tl.program_id(1)
    first, part = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    part_start, part_end = tl.load(parts + 3 * part), tl.load(parts + 3 * part + 1)
    unit = first // 16 + tl.arange(0, UNITS)[:, None, None]
    byte = tl.arange(0, 32)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    packed = tl.load(units + (unit.to(tl.int64) * blocks + block) * 512 + byte, mask=unit * 16 < part_end, other=0)
    packed = packed.to(tl.int32)
    n = first + tl.arange(0, UNITS * 16)
    n_mask = n < part_end
    nested_absmax += tl.load(parts + 3 * part + 2)
    nested = _nested(nested_absmax, (n - part_start) * blocks + block, n_mask, NESTED_SHIFT)
    place, offset = absmax + block.to(tl.int64) * N + n, tl.load(offsets + part)
    scale = _absmax(place, nested_code + part * 256, nested, offset, n_mask, NESTED_SHIFT)[:, None]
    k = tl.arange(0, 32)[None, :]
    row = out + (n - first_row).to(tl.int64)[:, None] * blocks * 64 + block * 64 + k
    high = _rows_by_columns(tl.load(codes + (packed >> 4)), UNITS, LANE_COLUMNS) * scale
    low = _rows_by_columns(tl.load(codes + (packed & 15)), UNITS, LANE_COLUMNS) * scale
    tl.store(row, rounded(high, out.dtype.element_ty), mask=n_mask[:, None])
    tl.store(row + 32, rounded(low, out.dtype.element_ty), mask=n_mask[:, None])


@dataclass(frozen=True)
class Plan:
    """How a product is done: "skinny", "mid" or, by cuBLAS, "prefill". rows: of x in a tile; splits: of K; unroll:
    blocks of K in an iteration. Only `splits` changes the bits of a row, so it is the same for a whole plan."""

    name: str
    rows: int = 0
    splits: int = 0
    unroll: int = 0
    warps: int = 0


def plan(rows: int, weight: Fragments) -> Plan:
    """What is done for `rows` rows of x."""
    if rows <= SKINNY_ROWS:
        tile = max(16, triton.next_power_of_2(rows))
        return Plan("skinny", tile, weight.splits, unroll=2, warps=4 if tile < 64 else 8)
    if rows <= MID_ROWS:
        return Plan("mid", 64 if weight.out_features <= 8192 else 128, weight.mid_splits, unroll=1, warps=8)
    return Plan("prefill")


def nf4_linear(x: Tensor, weight: Fragments, out: Tensor | None = None, shrink: LoraTerm | None = None) -> Tensor:
    """y = x @ W.T (+ bias); x [M, K] bfloat16 or float16, contiguous rows; out [M, N] of x's dtype or None.

    shrink: the LoRA term of the same x, whose first half is computed too, in the skinny plan in the same launch.
    Raises ValueError for other dtypes and strides.
    """
    rows = x.shape[0]
    if x.stride(1) != 1 or x.dtype not in weight.tables:
        raise ValueError(f"x must be bfloat16 or float16 with contiguous rows, got {x.dtype} with strides {x.stride()}")
    y = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device) if out is None else out
    if y.shape != (rows, weight.out_features) or y.stride(1) != 1 or y.dtype is not x.dtype:
        raise ValueError(f"out must be {x.dtype} [{rows}, {weight.out_features}] with contiguous rows")
    if rows == 0:
        return y
    how = plan(rows, weight)
    if shrink is not None and how.name != "skinny":  # larger tiles of x leave no registers for both
        lora_shrink(x, shrink)
        shrink = None
    if how.name == "prefill":
        return _prefill(y, x, weight)
    split_sums = y
    if how.splits > 1:
        split_sums = torch.empty(how.splits, rows, weight.out_features, dtype=torch.float32, device=x.device)
    assert triton.cdiv(rows, how.rows) <= COUNTERS
    products, shrinks = triton.cdiv(rows, how.rows) * len(weight.tiles) * how.splits, shrink_programs(shrink)
    nf4_linear_kernel[(shrinks + products,)](
        y, x, weight.units, weight.absmax, weight.nested_absmax, weight.nested_code, weight.tables[x.dtype],
        weight.tiles, weight.table, weight.offsets, weight.bias, split_sums, weight.arrived,
        rows, weight.out_features, weight.blocks, triton.cdiv(weight.blocks, how.splits), x.stride(0), y.stride(0),
        UNITS=UNITS, ROWS=how.rows, UNROLL=how.unroll, SPLITS_OF_K=how.splits,
        LANE_COLUMNS=weight.lane_columns, NESTED_SHIFT=weight.nested_shift, ROW_IN_GROUP=weight.row_in_group,
        HAS_BIAS=weight.bias is not None, shrinks=shrinks, **shrink_arguments(shrink, x.dtype), STAGES=STAGES,
        num_warps=how.warps, num_stages=STAGES, **FUSION,
    )  # fmt: skip
    return y


def _prefill(y: Tensor, x: Tensor, weight: Fragments) -> Tensor:
    """Slab by slab of W: dequantize, multiply."""
    most = max(end - start for _, _, start, end in weight.slabs)
    slab = torch.empty(most, weight.in_features, dtype=x.dtype, device=x.device)
    for first_tile, count, start, end in weight.slabs:
        _dequantize(slab, weight, first_tile, count, start)
        part = y[:, start:end]
        torch.mm(x, slab[: end - start].T, out=part)
    if weight.bias is not None:
        y += weight.bias
    return y


def dequantize(weight: Fragments, dtype: torch.dtype) -> Tensor:
    """round(code * absmax) -> [N, K] in `dtype`, the bits of `nf4.dequantize`."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.units.device)
    _dequantize(out, weight, 0, len(weight.tiles), 0)
    return out


def _dequantize(out: Tensor, weight: Fragments, first_tile: int, count: int, first_row: int) -> None:
    dequantize_kernel[weight.blocks, count](
        out, weight.units, weight.absmax, weight.nested_absmax, weight.nested_code, weight.codes,
        weight.tiles, weight.table, weight.offsets, first_tile, first_row,
        weight.out_features, weight.blocks,
        UNITS=UNITS, LANE_COLUMNS=weight.lane_columns, NESTED_SHIFT=weight.nested_shift,
        num_warps=4, enable_fp_fusion=False,  # as the reference: multiply by nested absmax, then add the offset
    )  # fmt: skip
