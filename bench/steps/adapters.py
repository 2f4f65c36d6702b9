"""Random adapters where the engine's loader reads a folder; the way from host memory to the device is the real one.

A folder that holds an adapter is read as ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from steps.sizes import rank_of
from torch import Tensor

from lorry.adapters import loader
from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear, page_count
from lorry.adapters.layout import ModelLayout
from lorry.adapters.reading.files import Place
from lorry.adapters.reading.spec import CONFIG_NAME
from lorry.kernels.lora import PAGE_RANK, SITES

NUMBERS = 1 << 24  # random ones that all pages are cut from, each adapter's from other places
SCALE = 0.02  # of them
STRENGTH = 0.3  # RMS of what an adapter adds to the outputs of a linear, whose inputs have one of 1
STRIDE = 7919  # between the pages of two adapters, in units of ALIGNED
ALIGNED = 64


def revision_of(adapter: str) -> str:
    return f"random {adapter}"


class RandomAdapters:
    """Takes the place of `load_adapter` for folders without content, which are named by the adapter's id."""

    def __init__(self) -> None:
        self._numbers = torch.randn(NUMBERS, dtype=torch.float32) * SCALE
        self._read = loader.load_adapter
        self._typed: dict[torch.dtype, Tensor] = {}

    def install(self) -> None:
        loader.load_adapter = self._load

    def remove(self) -> None:
        loader.load_adapter = self._read

    def _load(
        self, place: Place, layout: ModelLayout, dtype: torch.dtype, *others: Any, **named: Any
    ) -> CanonicalAdapter:
        if (place.folder / CONFIG_NAME).exists():
            return self._read(place, layout, dtype, *others, **named)
        return self.make(place.folder.name, layout, dtype)

    def make(self, adapter: str, layout: ModelLayout, dtype: torch.dtype) -> CanonicalAdapter:
        """Of all linears, in pages that adapters share in memory where their ranks are whole pages."""
        rank, linears = rank_of(adapter), {}
        numbers = self._typed.setdefault(dtype, self._numbers.to(dtype))
        place = int(adapter.partition("-")[0]) * STRIDE + rank
        for layer, site in layout.linears():
            size, count = layout.page_elements(site), page_count(rank)
            start = place * ALIGNED % (NUMBERS - count * size)
            pages = numbers[start : start + count * size].view(count, size)
            inputs, outputs = layout.sites[site]
            if rank % PAGE_RANK:
                pages = _cut(pages.clone(), rank % PAGE_RANK, inputs, outputs)
            scaling = STRENGTH / (SCALE**2 * (inputs * rank) ** 0.5)
            linears[layer, site] = CanonicalLinear(pages, scaling)
            place += STRIDE
        return CanonicalAdapter(linears, rank, tuple(SITES), ("lora",), revision_of(adapter))


def _cut(pages: Tensor, ranks: int, inputs: int, outputs: int) -> Tensor:
    """Zeros beyond the first ranks of the last page."""
    a, b = torch.split(pages[-1], [PAGE_RANK * inputs, PAGE_RANK * outputs])
    a.view(PAGE_RANK, inputs)[ranks:] = 0
    b.view(PAGE_RANK, outputs)[ranks:] = 0
    return pages


def make_folders(root: Path, adapters: list[str]) -> Path:
    """An empty folder for each, so that the catalog finds them."""
    for adapter in adapters:
        (root / adapter).mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    return root
