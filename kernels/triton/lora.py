"""Low-rank updates on a GPU, in two halves with a small float32 workspace between them.

    shrink   partial[split, row, site, 16 p + r] = sum_{k of the split} x[row, k] * A_p[r, k]
    expand   y[row, site] += sum_p (scale_p * sum_split partial[split, row, site, 16 p :]) @ B_p
             y[row, site] += gain * y0[row, site] + shift     of the few adapters that have these, y0 the base's product

p runs over the pages of all adapters of a row's combo: `fill_routes` resolves slots, weights and pages into one list
for each segment and linear, once for all layers of a step, so that a kernel finds its page and the scale with one
load.

**Layout.** A *tile* is at most 16 rows (64 in long batches) of one segment; tiles cover every row of the batch, so
that a kernel that goes by tiles serves rows without adapters too. A page is A [16, K], then B [16, N], both row-
contiguous, at a multiple of 8 elements of the arena.

**Plan.** `shrink_tile` and `expand_tile` (or `expand_row`) are parts of other kernels: in decoding, shrink runs in
extra programs of the base product of the same x and expand in the kernel that reads y next, so LoRA costs no launch.
Long batches run the two as kernels of their own. A program of shrink is one (tile, split of K, page, site). 16 by 16
numbers occupy but one or two warps of a product, so with 16 rows each warp multiplies another slice of K.

**Rounding.** x and A multiply exactly into float32 sums where they have one dtype, and are taken to float32 where
not. The scaled ranks enter the product with B as two numbers of the arena's dtype, the rounded one and what that
left, so the whole is as good as float32 down to about 17 bits; so it is with 8-bit pages, whose numbers bfloat16
holds. Only what is stored in y is rounded; the stand-alone
expand, which keeps a gain and a shift out of its registers, rounds once more where there are such. A row's bits
depend on K, on its own pages and on whether tiles have 16 or 64 rows, not on the other rows.

Bound: the bytes of the pages of the distinct adapters. All tiles, steps and splits are calculated, not yet measured
on a GPU.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.lora import BYTES, EMBEDDING, PAGE_RANK, AdapterPages, LoraTerm, Routes, Segments, Site, make_routes
from lorry.kernels.triton.codes import HEADER, rank_scales, unpacked
from lorry.kernels.triton.common import FUSION, dot, rounded
from lorry.kernels.triton.lora_routes import VECTORS, fill_routes, page_list

RANK = tl.constexpr(PAGE_RANK)
WARPS, STAGES = 4, 3  # of the stand-alone shrink
SLICES = tl.constexpr(4)  # of K, summed side by side where tiles have 16 rows; as many in kernels of more warps
EXPAND_COLUMNS = 128
VECTOR_COLUMNS = tl.constexpr(32)


@triton.jit
def shrink_tile(
    program, x, stride_x, tiles, arena, page_offsets, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[split, rows of a tile, site, 16 p : 16 p + 16] = x[rows, k] @ A_p[:, k].T, k the split's columns.

    program: (site, page, split, tile) in one, the first the fastest, so that neighbours share x. linear: 7 layer +
    index of the first site. STAGES: steps of K under way.
    """
    site, page = program % SITES, program // SITES % pages
    split = program // (SITES * pages) % SPLITS
    tile = tiles + program // (SITES * pages * SPLITS) * 3
    start, count, segment = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if (count > 0) & (segment >= 0):
        listed = page_offsets + page_list(segment, linear + site, LINEARS, pages)
        offset = tl.load(listed + 1 + page)
        if page < tl.load(listed).to(tl.int32):
            ranks, local = tl.arange(0, RANK), tl.arange(0, TILE_ROWS)
            if TILE_ROWS == 16:
                k = tl.arange(0, SLICES)[:, None, None] * (STEP // SLICES) + tl.arange(0, STEP // SLICES)[None, None, :]
                row, rank = local[None, :, None], ranks[None, :, None]
                total = tl.zeros((SLICES, TILE_ROWS, RANK), tl.float32)
            else:
                k = tl.arange(0, STEP)[None, :]
                row, rank = local[:, None], ranks[:, None]
                total = tl.zeros((TILE_ROWS, RANK), tl.float32)
            row_mask = row < count
            x_row = x + start.to(tl.int64) * stride_x + (row * stride_x + k)
            if arena.dtype.element_ty.primitive_bitwidth == 8:
                a = arena + (tl.multiple_of(offset, 16) + HEADER) + (rank * in_features + k)
            else:
                a = arena + tl.multiple_of(offset, 8) + (rank * in_features + k)
            width = tl.cdiv(tl.cdiv(in_features, SPLITS), STEP) * STEP
            first = split * width
            for at in tl.range(first, tl.minimum(first + width, in_features), STEP, num_stages=STAGES):
                inside = at + k < in_features
                rows = tl.load(x_row + at, mask=row_mask & inside, other=0.0)
                page_a = tl.load(a + at, mask=inside, other=0)
                if arena.dtype.element_ty.primitive_bitwidth == 8:
                    page_a = unpacked(page_a, x.dtype.element_ty)
                elif x.dtype != arena.dtype:
                    rows, page_a = rows.to(tl.float32), page_a.to(tl.float32)
                if TILE_ROWS == 16:
                    total = dot(rows, tl.permute(page_a, (0, 2, 1)), total)
                else:
                    total = dot(rows, page_a.T, total)
            if TILE_ROWS == 16:
                total = tl.sum(total, axis=0)
            if arena.dtype.element_ty.primitive_bitwidth == 8:
                total *= rank_scales(arena, offset)[None, :]
            place = (split.to(tl.int64) * capacity + start + local) * (SITES * pages) + site * pages + page
            tl.store(partial + place[:, None] * RANK + ranks[None, :], total, mask=(local < count)[:, None])


@triton.jit
def output_vectors(
    columns, column_mask, segment, site, size,
    arena, page_offsets, page_scales, linear, pages, LINEARS: tl.constexpr,
):  # fmt: skip
    """gain and shift of all vector pages of a segment's combo, weighted: y0 becomes y0 + gain y0 + shift.

    columns: of the site, best in the shape in which they are wanted, such as [1, C]; size: N of the site. Both are
    zeros for a segment below 0.
    """
    at = page_list(segment, linear + site, LINEARS, pages)
    count = (tl.load(page_offsets + at, mask=segment >= 0, other=0) >> 32).to(tl.int32)
    gain, shift = columns * 0.0, columns * 0.0
    for index in tl.range(0, count, num_stages=1):
        entry = at + pages - index
        vectors = (arena + (tl.load(page_offsets + entry) - VECTORS)).to(tl.pointer_type(tl.float32))
        weight = tl.load(page_scales + entry)
        gain += weight * tl.load(vectors + columns, mask=column_mask, other=0.0)
        shift += weight * tl.load(vectors + size + columns, mask=column_mask, other=0.0)
    return gain, shift


@triton.jit
def _listed(page_offsets, page_scales, at, inside, UNIT: tl.constexpr):
    """Offset and scale of a page; unlike a hint, a product tells that UNIT, 8 or 16, divides the offset even around a
    loop."""
    offset = tl.load(page_offsets + at, mask=inside, other=0)
    return offset >> (UNIT // 8 + 2), tl.load(page_scales + at, mask=inside, other=0.0)


@triton.jit
def _hidden(ranks, mask, split_stride, SPLITS: tl.constexpr):
    """Sum of the splits in their order."""
    hidden = tl.load(ranks, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        hidden += tl.load(ranks + split * split_stride, mask=mask, other=0.0)
    return hidden


@triton.jit
def _add_product(acc, hidden, page_b, arena_dtype: tl.constexpr):
    """acc + hidden @ page_b; hidden float32, page_b of `arena_dtype`."""
    dtype: tl.constexpr = tl.bfloat16 if arena_dtype.primitive_bitwidth == 8 else arena_dtype
    if arena_dtype.primitive_bitwidth == 8:
        page_b = unpacked(page_b, dtype)
    if dtype == tl.float32:
        acc = dot(hidden, page_b, acc)
    else:
        high = rounded(hidden, dtype)
        acc = dot(high, page_b, acc)
        acc = dot(rounded(hidden - high.to(tl.float32), dtype), page_b, acc)
    return acc


@triton.jit
def expand_tile(
    acc, rows, row_mask, columns, column_mask, segment, site, size,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """acc + sum_p scale_p * sum_split partial[split, rows, site, p] @ B_p[:, columns], float32 [R, C].

    rows: [R] of one segment, R >= 16; columns: [C] of the site, C >= 16; size: N of the site. A segment below 0 adds
    nothing.
    """
    UNIT: tl.constexpr = 16 if arena.dtype.element_ty.primitive_bitwidth == 8 else 8
    FRONT: tl.constexpr = HEADER if arena.dtype.element_ty.primitive_bitwidth == 8 else 0
    at = page_list(segment, linear + site, LINEARS, pages)
    count = tl.load(page_offsets + at, mask=segment >= 0, other=0).to(tl.int32)
    unit, scale = _listed(page_offsets, page_scales, at + 1, segment >= 0, UNIT)  # not after count: loads are slow
    ranks = tl.arange(0, RANK)
    ranks_of = partial + (rows.to(tl.int64)[:, None] * SITES + site) * (pages * RANK) + ranks[None, :]
    split_stride = tl.cast(capacity, tl.int64) * (SITES * pages * RANK)
    b = arena + (in_features * RANK + FRONT) + ranks[:, None] * size + columns[None, :]
    for page in tl.range(0, count, num_stages=1):
        page_b = tl.load(b + unit * UNIT, mask=column_mask[None, :], other=0)
        hidden = _hidden(ranks_of + page * RANK, row_mask[:, None], split_stride, SPLITS) * scale
        acc = _add_product(acc, hidden, page_b, arena.dtype.element_ty)
        unit, scale = _listed(page_offsets, page_scales, at + 2 + page, page + 1 < count, UNIT)
    return acc


@triton.jit
def expand_pair(
    acc_0, acc_1, rows, row_mask, columns, column_mask, segment, size,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`expand_tile` of sites 0 and 1, both [16, N = size], the loads of both under way at once."""
    UNIT: tl.constexpr = 16 if arena.dtype.element_ty.primitive_bitwidth == 8 else 8
    FRONT: tl.constexpr = HEADER if arena.dtype.element_ty.primitive_bitwidth == 8 else 0
    at_0, at_1 = page_list(segment, linear, LINEARS, pages), page_list(segment, linear + 1, LINEARS, pages)
    count_0 = tl.load(page_offsets + at_0, mask=segment >= 0, other=0).to(tl.int32)
    count_1 = tl.load(page_offsets + at_1, mask=segment >= 0, other=0).to(tl.int32)
    unit_0, scale_0 = _listed(page_offsets, page_scales, at_0 + 1, segment >= 0, UNIT)
    unit_1, scale_1 = _listed(page_offsets, page_scales, at_1 + 1, segment >= 0, UNIT)
    ranks = tl.arange(0, RANK)
    ranks_0 = partial + rows.to(tl.int64)[:, None] * (SITES * pages * RANK) + ranks[None, :]
    split_stride = tl.cast(capacity, tl.int64) * (SITES * pages * RANK)
    b = arena + (in_features * RANK + FRONT) + ranks[:, None] * size + columns[None, :]
    for page in tl.range(0, tl.maximum(count_0, count_1), num_stages=1):
        in_0, in_1 = page < count_0, page < count_1  # the interpreter cannot combine these with a mask
        mask_0, mask_1 = columns < tl.where(in_0, size, 0), columns < tl.where(in_1, size, 0)
        b_0 = tl.load(b + unit_0 * UNIT, mask=(column_mask & mask_0)[None, :], other=0)
        b_1 = tl.load(b + unit_1 * UNIT, mask=(column_mask & mask_1)[None, :], other=0)
        page_ranks = ranks_0 + page * RANK
        hidden_0 = _hidden(page_ranks, row_mask[:, None], split_stride, SPLITS) * scale_0
        hidden_1 = _hidden(page_ranks + pages * RANK, row_mask[:, None], split_stride, SPLITS) * scale_1
        hidden_0, hidden_1 = tl.where(in_0, hidden_0, 0.0), tl.where(in_1, hidden_1, 0.0)
        acc_0 = _add_product(acc_0, hidden_0, b_0, arena.dtype.element_ty)
        acc_1 = _add_product(acc_1, hidden_1, b_1, arena.dtype.element_ty)
        unit_0, scale_0 = _listed(page_offsets, page_scales, at_0 + 2 + page, page + 1 < count_0, UNIT)
        unit_1, scale_1 = _listed(page_offsets, page_scales, at_1 + 2 + page, page + 1 < count_1, UNIT)
    return acc_0, acc_1


@triton.jit
def expand_row(
    acc, row, columns, column_mask, segment, site, size,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr = 16,
):  # fmt: skip
    """`expand_tile` of one row in float32 sums without the tensor cores: acc [C].

    GROUP: ranks, a power of two to 16, whose B is held in registers at a time.
    """
    UNIT: tl.constexpr = 16 if arena.dtype.element_ty.primitive_bitwidth == 8 else 8
    FRONT: tl.constexpr = HEADER if arena.dtype.element_ty.primitive_bitwidth == 8 else 0
    at = page_list(segment, linear + site, LINEARS, pages)
    count = tl.load(page_offsets + at, mask=segment >= 0, other=0).to(tl.int32)
    unit, scale = _listed(page_offsets, page_scales, at + 1, segment >= 0, UNIT)
    ranks_of = partial + (tl.cast(row, tl.int64) * SITES + site) * (pages * RANK)
    split_stride = tl.cast(capacity, tl.int64) * (SITES * pages * RANK)
    b = arena + (in_features * RANK + FRONT) + columns[None, :]
    for page in tl.range(0, count, num_stages=1):
        for first in tl.static_range(0, RANK, GROUP):
            ranks = first + tl.arange(0, GROUP)
            page_b = tl.load(b + unit * UNIT + ranks[:, None] * size, mask=column_mask[None, :], other=0)
            hidden = _hidden(ranks_of + page * RANK + ranks, ranks < RANK, split_stride, SPLITS) * scale
            acc += tl.sum(hidden[:, None] * unpacked(page_b, tl.float32), axis=0)
        unit, scale = _listed(page_offsets, page_scales, at + 2 + page, page + 1 < count, UNIT)
    return acc


@triton.jit
def _site(site, a, b, c):
    return tl.where(site == 0, a, tl.where(site == 1, b, c))


@triton.jit(do_not_specialize=["linear", "capacity", "pages"])
def lora_shrink_kernel(
    x, stride_x, tiles, arena, page_offsets, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    shrink_tile(
        tl.program_id(0), x, stride_x, tiles, arena, page_offsets, partial, linear, capacity, pages, in_features,
        LINEARS, SITES, SPLITS, TILE_ROWS, STEP, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["linear", "capacity", "pages"])
def lora_gather_kernel(
    token_ids, tiles, arena, page_offsets, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """partial[0, rows of a tile, 0, 16 p : 16 p + 16] = A_p[:, token_ids[rows]]; program (tile, page)."""
    tile, page = tiles + tl.program_id(0) * 3, tl.program_id(1)
    start, count, segment = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if (count > 0) & (segment >= 0):
        listed = page_offsets + page_list(segment, linear, LINEARS, pages)
        offset = tl.load(listed + 1 + page)
        if page < tl.load(listed).to(tl.int32):
            ranks, local = tl.arange(0, RANK), tl.arange(0, TILE_ROWS)
            row_mask = (local < count)[:, None]
            tokens = tl.load(token_ids + start + local, mask=local < count, other=0)
            a = arena + offset
            if arena.dtype.element_ty.primitive_bitwidth == 8:
                a += HEADER
            columns = a + (ranks.to(tl.int64) * in_features)[None, :] + tokens[:, None]
            place = (start.to(tl.int64) + local) * pages + page
            gathered = unpacked(tl.load(columns, mask=row_mask, other=0), tl.float32)
            if arena.dtype.element_ty.primitive_bitwidth == 8:
                gathered *= rank_scales(arena, offset)[None, :]
            tl.store(partial + place[:, None] * RANK + ranks[None, :], gathered, mask=row_mask)


@triton.jit(
    do_not_specialize=["linear", "capacity", "pages", "start_0", "start_1", "start_2", "size_0", "size_1", "size_2"]
)
def lora_expand_kernel(
    y, stride_y, tiles, start_0, start_1, start_2, size_0, size_1, size_2,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Program (tile, COLUMNS columns of one site). ALIGNMENT: what divides the starts and the sizes."""
    tile = tiles + tl.program_id(0) * 3
    start, count, segment = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if (count > 0) & (segment >= 0):
        block = tl.program_id(1)
        blocks_0, blocks_1 = tl.cdiv(size_0, COLUMNS), tl.cdiv(size_1, COLUMNS)
        site = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
        block -= _site(site, 0, blocks_0, blocks_0 + blocks_1)
        size = tl.multiple_of(_site(site, size_0, size_1, size_2), ALIGNMENT)
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        local = tl.arange(0, TILE_ROWS)
        row_mask, column_mask = local < count, columns < size
        first_column = tl.multiple_of(_site(site, start_0, start_1, start_2), ALIGNMENT)
        place = y + start.to(tl.int64) * stride_y + first_column + local[:, None] * stride_y + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        if tl.load(page_offsets + page_list(segment, linear + site, LINEARS, pages)) >> 32 > 0:
            row_place = y + start.to(tl.int64) * stride_y + first_column + local[:, None] * stride_y
            for part in tl.range(0, COLUMNS, VECTOR_COLUMNS, num_stages=1):  # few, for the registers
                own = block * COLUMNS + part + tl.arange(0, VECTOR_COLUMNS)[None, :]
                gain, shift = output_vectors(
                    own, own < size, segment, site, size, arena, page_offsets, page_scales, linear, pages, LINEARS
                )
                inside = row_mask[:, None] & (own < size)
                base = tl.load(row_place + own, mask=inside, other=0.0).to(tl.float32)
                tl.store(row_place + own, rounded(base + (gain * base + shift), y.dtype.element_ty), mask=inside)
            tl.debug_barrier()
        acc = expand_tile(
            tl.zeros((TILE_ROWS, COLUMNS), tl.float32),
            start + local, row_mask, columns, column_mask, segment, site, size,
            arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features, LINEARS, SITES, SPLITS,
        )  # fmt: skip
        base = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, rounded(base + acc, y.dtype.element_ty), mask=mask)


def _arguments(term: LoraTerm) -> dict[str, Any]:
    routes = term.routes
    _, layers, sites, _ = routes.page_offsets.shape
    splits, arena = term.splits, term.pages.arena
    assert routes.capacity * splits * len(term.sites) * routes.pages * PAGE_RANK <= routes.partial.numel(), (
        "these routes were not made for this product"
    )
    return {
        "arena": arena.view(torch.uint8) if arena.dtype is torch.float8_e4m3fn else arena,
        "page_offsets": routes.page_offsets,
        "partial": routes.partial,
        "linear": term.layer * sites + term.sites[0].index,
        "capacity": routes.capacity,
        "pages": routes.pages,
        "in_features": term.in_features,
        "LINEARS": layers * sites,
        "SITES": len(term.sites),
        "SPLITS": splits,
    }


def expand_arguments(term: LoraTerm | None) -> dict[str, Any]:
    """What a kernel that calls `expand_tile` or `expand_row` takes besides; None: no LoRA, SITES is 0."""
    if term is None or term.routes.pages == 0:
        names = ("arena", "page_offsets", "page_scales", "partial", "linear", "capacity", "pages", "in_features")
        return dict.fromkeys(names) | {"LINEARS": 0, "SITES": 0, "SPLITS": 0}
    return _arguments(term) | {"page_scales": term.routes.page_scales}


def shrink_arguments(term: LoraTerm | None, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel that calls `shrink_tile` takes besides, for x of `dtype`; without LoRA SITES is 0."""
    if term is None or term.routes.pages == 0:
        names = ("tiles", "arena", "page_offsets", "partial", "linear", "capacity", "pages", "in_features")
        return dict.fromkeys(names) | dict.fromkeys(("LINEARS", "SITES", "SPLITS", "TILE_ROWS", "STEP"), 0)
    routes = term.routes
    multiplied = dtype if term.pages.arena.dtype in (dtype, *BYTES) else torch.float32
    step = _step(routes.tile_rows, multiplied)
    return _arguments(term) | {"tiles": routes.tiles, "TILE_ROWS": routes.tile_rows, "STEP": step}


def _step(tile_rows: int, dtype: torch.dtype) -> int:
    """Columns of x and A multiplied at a time in `dtype`; float32 has no tensor cores and spills with more."""
    if dtype is torch.float32:
        return 64 if tile_rows == 16 else 32
    return 256 if tile_rows == 16 else 128


def shrink_programs(term: LoraTerm | None) -> int:
    """How many programs `shrink_tile` wants."""
    if term is None:
        return 0
    routes = term.routes
    return routes.tile_count * len(term.sites) * routes.pages * term.splits


def lora_shrink(x: Tensor, term: LoraTerm) -> None:
    """Write the workspace of `term.routes`; x [M, K], contiguous rows, any stride between them."""
    if x.stride(1) != 1:
        raise ValueError(f"x must have contiguous rows, got strides {x.stride()}")
    if x.shape[0] == 0 or term.routes.pages == 0:
        return
    lora_shrink_kernel[(shrink_programs(term),)](
        x, x.stride(0), **shrink_arguments(term, x.dtype), STAGES=STAGES,
        num_warps=WARPS, num_stages=STAGES, **FUSION,
    )  # fmt: skip


def lora_gather(token_ids: Tensor, term: LoraTerm) -> None:
    """`lora_shrink` of one-hot vectors; token_ids: int64 [M], contiguous."""
    if token_ids.shape[0] == 0 or term.routes.pages == 0:
        return
    routes = term.routes
    lora_gather_kernel[routes.tile_count, routes.pages](
        token_ids, routes.tiles, **_arguments(term), TILE_ROWS=routes.tile_rows, num_warps=1, num_stages=1, **FUSION
    )


def lora_expand(y: Tensor, term: LoraTerm) -> None:
    """y[rows, site] += what the workspace of `term.routes` makes with B; y [M, sum of N], contiguous rows."""
    if y.stride(1) != 1:
        raise ValueError(f"y must have contiguous rows, got strides {y.stride()}")
    if y.shape[0] == 0 or term.routes.pages == 0:
        return
    routes, sites = term.routes, term.sites
    starts, sizes = ([*values, 0, 0][:3] for values in ([s.start for s in sites], [s.size for s in sites]))
    blocks = sum(triton.cdiv(site.size, EXPAND_COLUMNS) for site in sites)
    lora_expand_kernel[routes.tile_count, blocks](
        y, y.stride(0), routes.tiles, *starts, *sizes, **expand_arguments(term), TILE_ROWS=routes.tile_rows,
        COLUMNS=EXPAND_COLUMNS, ALIGNMENT=alignment(*starts, *sizes),
        num_warps=4, num_stages=1, **FUSION,
    )  # fmt: skip


def alignment(*values: int) -> int:
    """The largest power of two, at most 16, that divides all values."""
    return next(power for power in (16, 8, 4, 2, 1) if all(value % power == 0 for value in values))


def lora_add(
    y: Tensor,
    x: Tensor,
    pages: AdapterPages,
    layer: int,
    sites: tuple[Site, ...],
    segments: Segments,
    routes: Routes | None = None,
) -> None:
    """As `lora.lora_add`; routes: filled for this batch with `fill_routes`, or None: they are made here."""
    rows, in_features = x.shape
    if rows == 0 or not segments.slots.numel():
        return
    runs = [
        tuple(site for _, site in run)
        for _, run in groupby(enumerate(sites), key=lambda numbered: numbered[1].index - numbered[0])
    ]
    if routes is None:
        count, adapters = segments.slots.shape
        widths = [(in_features, len(run)) for run in runs]
        routes = make_routes(rows, count, adapters * pages.offsets.shape[3], pages, widths)
        fill_routes(routes, segments, pages, rows)
    for run in runs:
        term = LoraTerm(routes, pages, layer, run, in_features)
        lora_shrink(x, term)
        lora_expand(y, term)


def lora_embed(
    y: Tensor,
    token_ids: Tensor,
    vocab_size: int,
    pages: AdapterPages,
    segments: Segments,
    routes: Routes | None = None,
) -> None:
    """As `lora.lora_embed`; routes: as in `lora_add`."""
    rows = y.shape[0]
    if rows == 0 or not segments.slots.numel():
        return
    if routes is None:
        count, adapters = segments.slots.shape
        routes = make_routes(rows, count, adapters * pages.offsets.shape[3], pages, [(1, 1)])
        fill_routes(routes, segments, pages, rows)
    term = LoraTerm(routes, pages, 0, (Site(EMBEDDING, 0, y.shape[1]),), vocab_size, one_hot=True)
    lora_gather(token_ids.contiguous(), term)
    lora_expand(y, term)
