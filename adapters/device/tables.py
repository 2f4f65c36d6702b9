"""The tables that kernels read: where each slot's pages lie and how they are scaled.

offsets[slot, layer, site, p]: int64, element offset of page p or -1       scaling[slot, layer, site]: float32

Behind the rank pages comes the vector page, if there is one, with VECTORS added to its offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorry.adapters.canonical import page_count
from lorry.adapters.device.uploads import Uploads
from lorry.adapters.layout import MAX_RANK, Linear
from lorry.kernels.lora import SITES, AdapterPages

Placed = Mapping[Linear, tuple[Sequence[int], float]]
"""Offsets of the pages as the table has them, and the scaling, of each adapted linear of one slot."""


class SlotTables:
    """Device tensors `pages`; a slot without an adapter holds -1 and 0. They change between two steps."""

    def __init__(self, arena: Tensor, max_slots: int, layers: int, uploads: Uploads) -> None:
        self._uploads = uploads
        shape = (max_slots, layers, len(SITES))
        device = arena.device
        self.pages = AdapterPages(
            arena=arena,
            offsets=torch.full((*shape, page_count(MAX_RANK) + 1), -1, dtype=torch.int64, device=device),
            scaling=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def write(self, slot: int, placed: Placed) -> bool:
        """False: there is no room on the way to the device, try again."""
        offsets, scaling = self._rows(placed)
        pages = self.pages
        return self._uploads.write(pages.offsets[slot], offsets) and self._uploads.write(pages.scaling[slot], scaling)

    def move(self, slot: int, linear: Linear, index: int, offset: int) -> None:
        """Page `index` of one linear is now to be found by `offset`."""
        self._uploads.fill(self.pages.offsets[slot, linear[0], SITES.index(linear[1]), index], offset)

    def clear(self, slot: int) -> None:
        self._uploads.fill(self.pages.offsets[slot], -1)
        self._uploads.fill(self.pages.scaling[slot], 0)

    def check(self, books: Mapping[int, Placed], free: Sequence[int]) -> None:
        """Prove that each slot's rows say what `books` say, and that those of `free` slots are clear."""
        offsets, scaling = self.pages.offsets.cpu(), self.pages.scaling.cpu()
        for slot, placed in books.items():
            expected_offsets, expected_scaling = self._rows(placed)
            assert torch.equal(offsets[slot], expected_offsets), f"the offsets of slot {slot} differ from the books"
            assert torch.equal(scaling[slot], expected_scaling), f"the scaling of slot {slot} differs from the books"
        clear = torch.tensor(free, dtype=torch.int64)
        assert bool((offsets[clear] == -1).all()) and not scaling[clear].any(), "a slot without an adapter has pages"

    def _rows(self, placed: Placed) -> tuple[Tensor, Tensor]:
        """offsets [layers, sites, max_pages] and scaling [layers, sites] of one slot, in host memory."""
        offsets = torch.full(self.pages.offsets.shape[1:], -1, dtype=torch.int64)
        scaling = torch.zeros(self.pages.scaling.shape[1:], dtype=torch.float32)
        sites, max_pages = offsets.shape[1:]
        rows = [layer * sites + SITES.index(site) for layer, site in placed]
        entries = [
            (row * max_pages + index, offset)
            for row, (places, _) in zip(rows, placed.values(), strict=True)
            for index, offset in enumerate(places)
        ]
        if entries:
            where, what = torch.tensor(entries, dtype=torch.int64).T
            offsets.view(-1)[where] = what
            scaling.view(-1)[torch.tensor(rows)] = torch.tensor([scale for _, scale in placed.values()])
        return offsets, scaling
