"""Low-rank updates of a batch whose rows use different adapters, as a sum over rank pages.

    y[rows, site] += sum_j weight_j * scaling[slot_j, layer, site] * sum_pages (x[rows] @ A.T) @ B

A page is 16 ranks of one adapted linear: A [16, K] and B [16, N], both row-contiguous in one flat arena. An
adapter of rank 40 owns three pages, the last zero-padded; a weighted mix of adapters is a longer list of pages.
Source: LoRA (arXiv:2106.09685); segments as in Punica (arXiv:2310.18547).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lorry.kernels import native

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAGE_RANK = 16


@dataclass(frozen=True)
class AdapterPages:
    """Resident tables, owned and filled by the adapter pool, read by the kernels.

    arena: flat bfloat16, float16 or float32; a page is A [16, K] followed by B [16, N] at an element offset.
    offsets: int64 [slots, layers, sites, max_pages], element offset of the page or -1; used pages come first.
    scaling: float32 [slots, layers, sites].
    """

    arena: Tensor
    offsets: Tensor
    scaling: Tensor


@dataclass(frozen=True)
class Segments:
    """Runs of batch rows that share one combo of adapters.

    starts: int32 [S + 1], half-open row ranges over the flat batch, empty segments are legal.
    slots: int32 [S, J], -1: none; J is the most adapters of any combo in this batch. weights: float32 [S, J].
    """

    starts: Tensor
    slots: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Site:
    """Where one adapted linear lies: its index in the sites axis, its first output column in y, its width N."""

    index: int
    start: int
    size: int


def lora_add_reference(
    y: Tensor, x: Tensor, pages: AdapterPages, layer: int, sites: tuple[Site, ...], segments: Segments
) -> None:
    """y[rows, site] += sum_j weight_j * scaling_j * sum_pages (x @ A.T) @ B in float32; as in `lora_add`."""
    in_features = x.shape[1]
    starts = segments.starts.tolist()
    for segment, slots in enumerate(segments.slots.tolist()):
        rows = slice(starts[segment], starts[segment + 1])
        if rows.start == rows.stop:
            continue
        hidden = x[rows].float()
        for column, slot in enumerate(slots):
            if slot < 0:
                continue
            for site in sites:
                scale = segments.weights[segment, column] * pages.scaling[slot, layer, site.index]
                columns = slice(site.start, site.start + site.size)
                for offset in pages.offsets[slot, layer, site.index].tolist():
                    if offset < 0:
                        break
                    middle = offset + PAGE_RANK * in_features
                    a = pages.arena[offset:middle].view(PAGE_RANK, in_features)
                    b = pages.arena[middle : middle + PAGE_RANK * site.size].view(PAGE_RANK, site.size)
                    y[rows, columns] += ((hidden @ a.float().T * scale) @ b.float()).to(y.dtype)


def lora_add(
    y: Tensor, x: Tensor, pages: AdapterPages, layer: int, sites: tuple[Site, ...], segments: Segments
) -> None:
    """y[rows, start:start+size] += sum_j weight_j * scaling[slot_j, layer, site] * sum_pages (x @ A.T) @ B.

    In place. y: [M, sum of N]; x: [M, K], shared by all sites of one call: (q, k, v), (o,), (gate, up) or
    (down,). Rows of no segment and rows whose slots are all -1 stay untouched.
    """
    library = native.library()
    if library is None or not _fits(y, x, pages, segments):
        lora_add_reference(y, x, pages, layer, sites, segments)
        return
    _, layers, site_count, max_pages = pages.offsets.shape
    first = layer * site_count
    status = library.lora_add(
        y.data_ptr(),
        y.stride()[0],
        x.data_ptr(),
        x.stride()[0],
        x.shape[1],
        pages.arena.data_ptr(),
        native.ELEMENT_TYPES[pages.arena.dtype],
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
    native.check(status)


@lru_cache(maxsize=256)
def site_table(sites: tuple[Site, ...]) -> ctypes.Array[ctypes.c_int64]:
    """int64 [sites, 3] of index, first column and width, as the CPU kernels read it."""
    values = [value for site in sites for value in (site.index, site.start, site.size)]
    return (ctypes.c_int64 * len(values))(*values)


def _fits(y: Tensor, x: Tensor, pages: AdapterPages, segments: Segments) -> bool:
    return (
        y.dtype is torch.float32
        and x.dtype is torch.float32
        and y.is_cpu
        and y.stride()[1] == 1
        and x.stride()[1] == 1
        and pages.arena.dtype in native.ELEMENT_TYPES
        and pages.arena.is_contiguous()
        and pages.offsets.is_contiguous()
        and pages.scaling.is_contiguous()
        and segments.starts.is_contiguous()
        and segments.slots.is_contiguous()
        and segments.weights.is_contiguous()
    )
