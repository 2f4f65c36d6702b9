"""The tables that kernels read: where each slot's pages lie and how they are scaled.

offsets[slot, layer, site, p]: int64, element offset of page p or -1       scaling[slot, layer, site]: float32

Behind the rank pages comes the vector page, if there is one, with VECTORS added to its offset. A linear with more
entries than a row of the table has goes on in the same row of the adapter's next slot, and so on. The embedding and
the head have tables of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lorry.adapters.canonical import page_count
from lorry.adapters.device.uploads import Uploads
from lorry.adapters.layout import ENDS, MAX_RANK, Linear
from lorry.kernels.lora import END_SITES, SITES, AdapterPages

LENGTH = page_count(MAX_RANK) + 1
"""Of a linear in one slot."""

Entries = tuple[Sequence[int], float]
"""Offsets of the pages as the table has them, and the scaling."""

Placed = Mapping[Linear, Entries]
"""Of each adapted linear of one adapter."""

Rows = Mapping[tuple[int, int], Entries]
"""By layer and column of a table."""


class SlotTables:
    """Device tensors `pages`; a slot without an adapter holds -1 and 0. They change between two steps."""

    def __init__(self, arena: Tensor, max_slots: int, layers: int, uploads: Uploads) -> None:
        self._uploads = uploads
        ends = _empty(arena, max_slots, 1, len(END_SITES))
        self.pages = _empty(arena, max_slots, layers, len(SITES), ends)
        self._ends = ends
        self._with_ends = set[int]()  # slots whose rows in the tables of the ends are not clear

    def write(self, slots: Sequence[int], placed: Placed) -> bool:
        """Of an adapter in these slots. False: there is no room on the way to the device, try again."""
        for slot, part in zip(slots, _parts(len(slots), placed), strict=True):
            layers, ends = _layers_and_ends(part)
            if ends:
                self._with_ends.add(slot)
            if not (self._write(self.pages, slot, layers) and (not ends or self._write(self._ends, slot, ends))):
                return False
        return True

    def move(self, slots: Sequence[int], linear: Linear, index: int, offset: int) -> None:
        """Page `index` of one linear is now to be found by `offset`."""
        pages = self._ends if linear[0] == ENDS else self.pages
        slot, entry = slots[index // LENGTH], index % LENGTH
        self._uploads.fill(pages.offsets[(slot, *_row(linear), entry)], offset)

    def clear(self, slot: int) -> None:
        for pages in (self.pages, self._ends):
            if pages is self.pages or slot in self._with_ends:
                self._uploads.fill(pages.offsets[slot], -1)
                self._uploads.fill(pages.scaling[slot], 0)
        self._with_ends.discard(slot)

    def check(self, books: Mapping[tuple[int, ...], Placed], free: Sequence[int]) -> None:
        """Prove that each adapter's slots have what `books` say, and that those of `free` slots are clear."""
        clear = torch.tensor(free, dtype=torch.int64)
        parts = [
            (slot, _layers_and_ends(part))
            for slots, placed in books.items()
            for slot, part in zip(slots, _parts(len(slots), placed), strict=True)
        ]
        for index, pages in enumerate((self.pages, self._ends)):
            offsets, scaling = pages.offsets.cpu(), pages.scaling.cpu()
            for slot, rows in parts:
                expected_offsets, expected_scaling = _tables(pages, rows[index])
                assert torch.equal(offsets[slot], expected_offsets), f"the offsets of slot {slot} differ from the books"
                assert torch.equal(scaling[slot], expected_scaling), (
                    f"the scaling of slot {slot} differs from the books"
                )
            assert bool((offsets[clear] == -1).all()) and not scaling[clear].any(), (
                "a slot without an adapter has pages"
            )

    def _write(self, pages: AdapterPages, slot: int, rows: Rows) -> bool:
        offsets, scaling = _tables(pages, rows)
        return self._uploads.write(pages.offsets[slot], offsets) and self._uploads.write(pages.scaling[slot], scaling)


def slots_for(entries: int) -> int:
    """How many slots an adapter takes whose longest list of pages has so many entries."""
    return max(1, -(-entries // LENGTH))


def _parts(slots: int, placed: Placed) -> Iterator[Placed]:
    """What of an adapter stands in each of its slots."""
    for first in range(0, slots * LENGTH, LENGTH):
        part = {linear: (places[first : first + LENGTH], scale) for linear, (places, scale) in placed.items()}
        yield {linear: entry for linear, entry in part.items() if entry[0]}


def _layers_and_ends(placed: Placed) -> tuple[Rows, Rows]:
    """What stands in the tables of the layers and in those of the ends."""
    layers, ends = dict[tuple[int, int], Entries](), dict[tuple[int, int], Entries]()
    for linear, entries in placed.items():
        (ends if linear[0] == ENDS else layers)[_row(linear)] = entries
    return layers, ends


def _row(linear: Linear) -> tuple[int, int]:
    """Layer and column of a linear in its table."""
    layer, site = linear
    return (0, END_SITES.index(site)) if layer == ENDS else (layer, SITES.index(site))


def _empty(arena: Tensor, slots: int, layers: int, sites: int, ends: AdapterPages | None = None) -> AdapterPages:
    shape, device = (slots, layers, sites), arena.device
    return AdapterPages(
        arena=arena,
        offsets=torch.full((*shape, LENGTH), -1, dtype=torch.int64, device=device),
        scaling=torch.zeros(shape, dtype=torch.float32, device=device),
        ends=ends,
    )


def _tables(pages: AdapterPages, placed: Rows) -> tuple[Tensor, Tensor]:
    """offsets [layers, sites, entries] and scaling [layers, sites] of one slot, in host memory."""
    offsets = torch.full(pages.offsets.shape[1:], -1, dtype=torch.int64)
    scaling = torch.zeros(pages.scaling.shape[1:], dtype=torch.float32)
    sites = offsets.shape[1]
    rows = [layer * sites + column for layer, column in placed]
    entries = [
        (row * LENGTH + index, offset)
        for row, (places, _) in zip(rows, placed.values(), strict=True)
        for index, offset in enumerate(places)
    ]
    if entries:
        where, what = torch.tensor(entries, dtype=torch.int64).T
        offsets.view(-1)[where] = what
        scaling.view(-1)[torch.tensor(rows)] = torch.tensor([scale for _, scale in placed.values()])
    return offsets, scaling
