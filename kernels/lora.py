"""Low-rank updates of a batch whose rows use different adapters, as a sum over rank pages.

    y[rows, site] += sum_j weight_j * (gain_j * y0 + shift_j + scaling[slot_j, layer, site] * sum_pages (x @ A.T) @ B)

A page is 16 ranks of one adapted linear: A [16, K] and B [16, N], both row-contiguous in one flat arena. An
adapter of rank 40 owns three pages, the last zero-padded; a weighted mix of adapters is a longer list of pages.
gain and shift [N], which few adapters have, lie in a *vector page*; y0 is what the base's product left in y.
Source: LoRA (arXiv:2106.09685); DoRA's gain (arXiv:2402.09353); segments as in Punica (arXiv:2310.18547).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorry.kernels import dispatch, native

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END_SITES = ("embed_tokens", "lm_head")
EMBEDDING, HEAD = range(2)  # their indices
PAGE_RANK = 16
BYTES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Types of 8-bit pages, and the largest number of each."""

VECTORS = 1  # added to the offset of a vector page, which like all offsets is a multiple of 8


@dataclass(frozen=True)
class AdapterPages:
    """Resident tables, owned and filled by the adapter pool, read by the kernels.

    arena: flat bfloat16, float16, float32, or of BYTES; a page is A [16, K] followed by B [16, N] at an element offset,
    in 8 bits behind float32 [16]: scales of the ranks, that of A and that of B in one.
    offsets: int64 [slots, layers, sites, max_pages], element offset of the page or -1; used pages come first, behind
    them the offset of a vector page + VECTORS: float32 [2, N], gain and shift, whatever the arena's dtype.
    scaling: float32 [slots, layers, sites], of the pages, not of the vectors.
    ends: the same of `END_SITES`, one layer of two sites, over the same arena; None: no adapter can change these.
    """

    arena: Tensor
    offsets: Tensor
    scaling: Tensor
    ends: AdapterPages | None = None


@dataclass(frozen=True)
class Segments:
    """Runs of batch rows that share one combo of adapters.

    starts: int32 [S + 1], half-open row ranges over the flat batch, empty segments are legal.
    slots: int32 [S, J], -1: none; J is the most adapters of any combo in this batch. weights: float32 [S, J].
    page_bound: as in `make_routes`; 0: what the tables could hold.
    """

    starts: Tensor
    slots: Tensor
    weights: Tensor
    page_bound: int = 0


@dataclass(frozen=True)
class Site:
    """Where one adapted linear lies: its index in the sites axis, its first output column in y, its width N."""

    index: int
    start: int
    size: int


@dataclass(frozen=True)
class Routes:
    """How the rows of one step find their pages on a GPU; made by `make_routes`, filled there by `fill_routes`.

    All shapes are capacities, so that a CUDA graph can hold the tensors. tiles: int32 [T, 3], first row, number of
    rows and segment (-1: rows without adapters) of runs of at most `tile_rows` rows of one segment; they cover every
    row once, in order; unused ones have no rows. row_segment: int32 [M], -1: no adapters.
    page_offsets: int64 [S, layers, sites, 1 + P], the number of pages of all adapters of the segment's combo, plus
    2**32 times that of their vector pages, then the offsets of the former and, from the end backwards, of the latter.
    page_scales: float32 of that shape, of a page weight * scaling, of vectors the weight; the first one is unused.
    partial: float32, flat: [splits, M, sites of one call, P * 16], written by shrink and read by expand, call by call.
    """

    tiles: Tensor
    row_segment: Tensor
    page_offsets: Tensor
    page_scales: Tensor
    partial: Tensor
    tile_rows: int

    @property
    def capacity(self) -> int:
        """M: most rows of a batch."""
        return self.row_segment.shape[0]

    @property
    def tile_count(self) -> int:
        """T: tiles, used and unused."""
        return self.tiles.shape[0]

    @property
    def pages(self) -> int:
        """P: most pages of a combo in one linear, vector pages included."""
        return self.page_offsets.shape[3] - 1


@dataclass(frozen=True)
class LoraTerm:
    """A LoRA sum on a GPU, of which one kernel does the first half (shrink) and a later one the second (expand).

    sites: those that share x, with consecutive indices: (q, k, v), (o,), (gate, up) or (down,). in_features: K.
    one_hot: x has a single 1 in each row.
    """

    routes: Routes
    pages: AdapterPages
    layer: int
    sites: tuple[Site, ...]
    in_features: int
    one_hot: bool = False

    @property
    def splits(self) -> int:
        """Of K, whose sums lie in `Routes.partial` one by one."""
        return 1 if self.one_hot else shrink_splits(self.in_features)


def make_routes(
    rows: int, segments: int, page_bound: int, pages: AdapterPages, widths: Iterable[tuple[int, int]]
) -> Routes:
    """Routes, not yet filled, on the device of `pages` for batches of at most `rows` rows in `segments` segments.

    page_bound: the most pages that a combo, all its adapters together, has in one linear; pages beyond it would be
    left out. widths: (K, number of sites) of every call that is to use the routes.
    """
    device = pages.offsets.device
    _, layers, sites, _ = pages.offsets.shape
    tile_rows = 64 if rows >= 512 else 16  # not yet measured on a GPU
    tiles = min(rows, -(-rows // tile_rows) + segments + 2)  # rows before and behind the segments have tiles too
    ranks = max(shrink_splits(k) * count for k, count in widths) * page_bound * PAGE_RANK
    listed = (segments, layers, sites, page_bound + 1)
    return Routes(
        tiles=torch.empty(tiles, 3, dtype=torch.int32, device=device),
        row_segment=torch.empty(rows, dtype=torch.int32, device=device),
        page_offsets=torch.empty(listed, dtype=torch.int64, device=device),
        page_scales=torch.empty(listed, dtype=torch.float32, device=device),
        partial=torch.empty(rows * ranks, dtype=torch.float32, device=device),
        tile_rows=tile_rows,
    )


def fill_routes(routes: Routes, segments: Segments, pages: AdapterPages, rows: int) -> None:
    """Fill `routes` on their device for a batch of `rows` rows; one launch, which a CUDA graph can capture where the
    segments are on that device.

    To be repeated when the segments change or a page moves. Segments with padding, for a graph: `starts` goes on with
    the number of rows. Raises ValueError where the batch exceeds what the routes were made for.
    """
    from lorry.kernels.triton import lora_routes as gpu

    gpu.fill_routes(routes, segments, pages, rows)


def lora_shrink(x: Tensor, term: LoraTerm) -> None:
    """The first half of a term as a launch of its own, for a product of x [M, K] that cannot do it on the side."""
    from lorry.kernels.triton import lora as gpu

    gpu.lora_shrink(x, term)


def shrink_splits(in_features: int) -> int:
    """Parts into which shrink cuts K, by K alone: a row's sums must not depend on the batch. Not yet measured."""
    return max(1, min(8, -(-in_features // 1024)))


def lora_add_reference(
    y: Tensor, x: Tensor, pages: AdapterPages, layer: int, sites: tuple[Site, ...], segments: Segments
) -> None:
    """As `lora_add`, in float32."""
    _add_reference(y, x.shape[1], lambda rows, a: x[rows].float() @ a.float().T, pages, layer, sites, segments)


def lora_embed_reference(
    y: Tensor, token_ids: Tensor, vocab_size: int, pages: AdapterPages, segments: Segments
) -> None:
    """As `lora_embed`, in float32."""
    site = Site(EMBEDDING, 0, y.shape[1])
    _add_reference(y, vocab_size, lambda rows, a: a[:, token_ids[rows]].float().T, pages, 0, (site,), segments)


def _add_reference(
    y: Tensor,
    in_features: int,
    shrunk: Callable[[slice, Tensor], Tensor],
    pages: AdapterPages,
    layer: int,
    sites: tuple[Site, ...],
    segments: Segments,
) -> None:
    """shrunk: rows and A of a page → x[rows] @ A.T, float32."""
    starts = segments.starts.tolist()
    for segment, slots in enumerate(segments.slots.tolist()):
        rows = slice(starts[segment], starts[segment + 1])
        if rows.start == rows.stop:
            continue
        before = y[rows].float().clone()
        for column, slot in enumerate(slots):
            if slot < 0:
                continue
            weight = float(segments.weights[segment, column])
            for site in sites:
                scale = weight * float(pages.scaling[slot, layer, site.index])
                columns = slice(site.start, site.start + site.size)
                for offset in pages.offsets[slot, layer, site.index].tolist():
                    if offset < 0:
                        break
                    if offset & VECTORS:
                        gain, shift = vectors_at(pages.arena, offset, site.size)
                        y[rows, columns] += (weight * (gain * before[:, columns] + shift)).to(y.dtype)
                        continue
                    page = pages.arena[offset : offset + page_elements(in_features, site.size, pages.arena.dtype)]
                    a, b, scales = page_parts(page, in_features, site.size)
                    y[rows, columns] += ((shrunk(rows, a) * (scale * scales)) @ b.float()).to(y.dtype)


def vectors_at(arena: Tensor, offset: int, size: int) -> Tensor:
    """gain and shift of a vector page, float32 [2, size]; offset: as in the table, VECTORS included."""
    start = offset - VECTORS
    return arena[start : start + vector_elements(size, arena.dtype)].view(torch.float32)[: 2 * size].view(2, size)


def page_elements(in_features: int, out_features: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` of a rank page, in 8 bits its scales included."""
    return _header_elements(dtype) + PAGE_RANK * (in_features + out_features)


def page_parts(page: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """A [16, K] and B [16, N] as they are stored, and the scales of the ranks, float32 [16]; views but for ones."""
    start = _header_elements(page.dtype)
    middle = start + PAGE_RANK * in_features
    a, b = page[start:middle].view(PAGE_RANK, in_features), page[middle:].view(PAGE_RANK, out_features)
    scales = page[:start].view(torch.float32) if start else torch.ones(PAGE_RANK, device=page.device)
    return a, b, scales


def _header_elements(dtype: torch.dtype) -> int:
    """Of a page in front of A: the scales of 8 bits."""
    return PAGE_RANK * torch.float32.itemsize if dtype in BYTES else 0


def vector_elements(size: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that a vector page of `size` outputs takes, a multiple of 16."""
    return -(-2 * size * torch.float32.itemsize // (16 * dtype.itemsize)) * 16


def lora_add(
    y: Tensor,
    x: Tensor,
    pages: AdapterPages,
    layer: int,
    sites: tuple[Site, ...],
    segments: Segments,
    routes: Routes | None = None,
) -> None:
    """Add what the adapters of each row do to the outputs of `sites`, as above.

    In place; y holds y0. y: [M, sum of N]; x: [M, K], shared by all sites of one call: (q, k, v), (o,), (gate, up) or
    (down,). Rows of no segment and rows whose slots are all -1 stay untouched.

    routes: on a GPU, what `fill_routes` made of these segments and pages; None: it is done here. A CPU does not use
    them. Page offsets must be multiples of 8, those of pages in 8 bits of 16.
    """
    if dispatch.on_gpu(y):
        from lorry.kernels.triton import lora as gpu

        gpu.lora_add(y, x, pages, layer, sites, segments, routes)
        return
    library = native.library()
    if library is None or x.dtype is not torch.float32 or x.stride()[1] != 1 or not _fits(y, pages, segments):
        lora_add_reference(y, x, pages, layer, sites, segments)
        return
    inputs = x.data_ptr(), x.stride()[0], x.shape[1]
    native.check(library.lora_add(y.data_ptr(), y.stride()[0], *inputs, *_arguments(pages, layer, sites, segments)))


def lora_embed(
    y: Tensor,
    token_ids: Tensor,
    vocab_size: int,
    pages: AdapterPages,
    segments: Segments,
    routes: Routes | None = None,
) -> None:
    """Add what the adapters of each row do to its token's embedding: `lora_add` of one-hot vectors.

        y[row] += sum_j weight_j * (gain_j * y0 + shift_j + scaling[slot_j] * sum_pages A[:, token_ids[row]] @ B)

    In place; y [M, H] holds the base's embeddings. token_ids: int64 [M], below vocab_size, which is K: `embed` has seen
    to that. pages: `AdapterPages.ends`. The rest as in `lora_add`.
    """
    if dispatch.on_gpu(y):
        from lorry.kernels.triton import lora as gpu

        gpu.lora_embed(y, token_ids, vocab_size, pages, segments, routes)
        return
    library = native.library()
    if library is None or not token_ids.is_contiguous() or not _fits(y, pages, segments):
        lora_embed_reference(y, token_ids, vocab_size, pages, segments)
        return
    sites = (Site(EMBEDDING, 0, y.shape[1]),)
    inputs = token_ids.data_ptr(), vocab_size
    native.check(library.lora_embed(y.data_ptr(), y.stride()[0], *inputs, *_arguments(pages, 0, sites, segments)))


def _arguments(pages: AdapterPages, layer: int, sites: tuple[Site, ...], segments: Segments) -> tuple[Any, ...]:
    """What the CPU kernels take behind the inputs."""
    _, layers, site_count, max_pages = pages.offsets.shape
    first = layer * site_count
    return (
        pages.arena.data_ptr(),
        native.PAGE_TYPES[pages.arena.dtype],
        pages.offsets.data_ptr() + 8 * first * max_pages,
        pages.scaling.data_ptr() + 4 * first,
        layers * site_count,
        max_pages,
        site_table(sites),
        len(sites),
        segments.starts.data_ptr(),
        segments.slots.data_ptr(),
        segments.weights.data_ptr(),
        segments.slots.shape[0],
        segments.slots.shape[1],
    )


@lru_cache(maxsize=256)
def site_table(sites: tuple[Site, ...]) -> ctypes.Array[ctypes.c_int64]:
    """int64 [sites, 3] of index, first column and width, as the CPU kernels read it."""
    values = [value for site in sites for value in (site.index, site.start, site.size)]
    return (ctypes.c_int64 * len(values))(*values)


def _fits(y: Tensor, pages: AdapterPages, segments: Segments) -> bool:
    return (
        y.dtype is torch.float32
        and y.is_cpu
        and y.stride()[1] == 1
        and pages.arena.dtype in native.PAGE_TYPES
        and pages.arena.is_contiguous()
        and pages.offsets.is_contiguous()
        and pages.scaling.is_contiguous()
        and segments.starts.is_contiguous()
        and segments.slots.is_contiguous()
        and segments.weights.is_contiguous()
    )
