"""Where the rows of a batch find their adapters' pages, resolved on the GPU once per step; see `lora.Routes`.

    row_segment[m], tiles[t]               from the segments' bounds
    page_offsets[s, linear, :], page_scales  the pages of all adapters of segment s, weight * scaling of each, and
                                             from the end backwards their vector pages, weight of each

One launch. Capacities, not the batch, fix its shapes, so that a CUDA graph can hold what reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorry.kernels import lora
from lorry.kernels.lora import AdapterPages, Routes, Segments
from lorry.kernels.triton.common import FUSION

VECTORS = tl.constexpr(lora.VECTORS)
ROUTE_LINEARS = 32  # that a program resolves
LEAST_GROUPS = 64  # of rows, in one vector: fewer would be another compilation, and no quicker


@triton.jit
def page_list(segment, linear, LINEARS: tl.constexpr, pages):
    """Where the pages of a linear are listed: their numbers, then the pages; pages: the most of a list."""
    return (segment.to(tl.int64) * LINEARS + linear) * (pages + 1)


@triton.jit(do_not_specialize=["segments", "rows", "capacity", "pages", "tile_count", "adapters"])
def fill_routes_kernel(
    tiles, row_segment, page_offsets, page_scales, starts, slots, weights, offsets, scaling,
    segments, rows, capacity, pages, tile_count, adapters,
    LINEARS: tl.constexpr, MAX_PAGES: tl.constexpr,
    TILE_ROWS: tl.constexpr, GROUPS: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_LINEARS: tl.constexpr,
):  # fmt: skip
    """Program (group of rows, job).

    Group 0 are the rows before the first segment, g + 1 those of segment g, the last one those behind. Job 0 writes
    the tiles and rows of its group, job b + 1 the pages of BLOCK_LINEARS linears.
    """
    group, job = tl.program_id(0), tl.program_id(1)
    segment = group - 1
    inside = (segment >= 0) & (segment < segments)
    if job == 0:
        groups = tl.arange(0, GROUPS)
        bounds = starts + groups
        low = tl.load(bounds - 1, mask=(groups > 0) & (groups <= segments + 1), other=0)
        high = tl.load(bounds, mask=groups <= segments, other=rows)
        low, high = tl.minimum(low, rows), tl.minimum(high, rows)
        sizes = tl.where(groups <= segments + 1, high - low, 0)
        tiles_of = (sizes + TILE_ROWS - 1) // TILE_ROWS
        first_tile = tl.sum(tl.where(groups < group, tiles_of, 0))
        own_tiles = tl.sum(tl.where(groups == group, tiles_of, 0))
        first_row = tl.sum(tl.where(groups < group, sizes, 0))
        own_rows = tl.sum(tl.where(groups == group, sizes, 0))
        adapted = tl.zeros((), tl.int32) - 1
        for adapter in range(adapters):
            slot = tl.load(slots + segment * adapters + adapter, mask=inside, other=-1)
            adapted = tl.where(slot >= 0, segment, adapted)
        lane = tl.arange(0, BLOCK)
        for at in range(0, own_tiles, BLOCK):
            index = at + lane
            where, mask = tiles + (first_tile + index) * 3, index < own_tiles
            tl.store(where, first_row + index * TILE_ROWS, mask=mask)
            tl.store(where + 1, tl.minimum(own_rows - index * TILE_ROWS, TILE_ROWS), mask=mask)
            tl.store(where + 2, tl.zeros((BLOCK,), tl.int32) + adapted, mask=mask)
        for at in range(0, own_rows, BLOCK):
            mask = at + lane < own_rows
            tl.store(row_segment + first_row + at + lane, tl.zeros((BLOCK,), tl.int32) + adapted, mask=mask)
        if segment == segments:  # unused capacity
            for at in range(first_tile + own_tiles, tile_count, BLOCK):
                where, mask = tiles + (at + lane) * 3, at + lane < tile_count
                tl.store(where, tl.zeros((BLOCK,), tl.int32), mask=mask)
                tl.store(where + 1, tl.zeros((BLOCK,), tl.int32), mask=mask)
                tl.store(where + 2, tl.zeros((BLOCK,), tl.int32) - 1, mask=mask)
            for at in range(rows, capacity, BLOCK):
                tl.store(row_segment + at + lane, tl.zeros((BLOCK,), tl.int32) - 1, mask=at + lane < capacity)
    elif inside:
        linear = (job - 1) * BLOCK_LINEARS + tl.arange(0, BLOCK_LINEARS)
        page = tl.arange(0, LIST)[None, :]
        listed = page_list(segment, linear, LINEARS, pages)
        found = tl.zeros((BLOCK_LINEARS,), tl.int32)
        vectors = tl.zeros((BLOCK_LINEARS,), tl.int32)
        for adapter in range(adapters):
            slot = tl.load(slots + segment * adapters + adapter)
            if slot >= 0:
                own = slot.to(tl.int64) * LINEARS + linear
                mask = (linear < LINEARS)[:, None] & (page < MAX_PAGES)
                offset = tl.load(offsets + own[:, None] * MAX_PAGES + page, mask=mask, other=-1)
                weight = tl.load(weights + segment * adapters + adapter)
                scale = tl.load(scaling + own, mask=linear < LINEARS, other=0.0)[:, None] * weight
                is_vectors = (offset >= 0) & (offset % 2 == VECTORS)
                is_page = (offset >= 0) & (offset % 2 == 0)
                place = tl.where(is_vectors, pages - vectors[:, None], 1 + found[:, None] + page)
                here = (is_vectors & (vectors[:, None] < pages)) | (is_page & (place <= pages))
                where = listed[:, None] + place
                tl.store(page_offsets + where, offset, mask=here)
                tl.store(page_scales + where, tl.where(is_vectors, weight, scale), mask=here)
                found += tl.sum(is_page.to(tl.int32), axis=1)
                vectors += tl.sum(is_vectors.to(tl.int32), axis=1)
        vectors = tl.minimum(vectors, pages)
        found = tl.minimum(found, pages - vectors)
        numbers = found.to(tl.int64) + (vectors.to(tl.int64) << 32)
        tl.store(page_offsets + listed, numbers, mask=linear < LINEARS)


def fill_routes(routes: Routes, segments: Segments, pages: AdapterPages, rows: int) -> None:
    """Fill `routes` for a batch of `rows` rows, in one launch; segments and pages as in `lora.lora_add`.

    Raises ValueError where the batch or the segments exceed what the routes were made for.
    """
    count, adapters = segments.slots.shape
    _, layers, sites, max_pages = pages.offsets.shape
    if rows > routes.capacity or count > routes.page_offsets.shape[0]:
        raise ValueError(f"{rows} rows in {count} segments do not fit routes for {routes.capacity} rows")
    device = routes.tiles.device
    starts, slots, weights = (
        tensor.to(device, non_blocking=True) for tensor in (segments.starts, segments.slots, segments.weights)
    )
    fill_routes_kernel[count + 2, 1 + triton.cdiv(layers * sites, ROUTE_LINEARS)](
        routes.tiles, routes.row_segment, routes.page_offsets, routes.page_scales, starts, slots, weights,
        pages.offsets, pages.scaling, count, rows, routes.capacity, routes.pages, routes.tile_count, adapters,
        LINEARS=layers * sites, MAX_PAGES=max_pages,
        TILE_ROWS=routes.tile_rows, GROUPS=max(LEAST_GROUPS, triton.next_power_of_2(count + 2)),
        LIST=triton.next_power_of_2(max_pages), BLOCK=128, BLOCK_LINEARS=ROUTE_LINEARS,
        num_warps=4, num_stages=1, **FUSION,
    )  # fmt: skip
