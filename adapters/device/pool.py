"""Rank and vector pages on the device: one arena, one slot per resident adapter revision; more where a slot's tables
do not hold all pages of a linear, and then the first one stands for all.

    slot life:   reserve ─▶ fill … fill ─▶ resident ⇄ in use (acquire, release) ─▶ evict

Filling is cut into bounded pieces, so that a load never holds up a step. Everything here runs in the engine thread
between two steps; that is also why pages may be moved (`slabs.py` says when). How bytes get to the device, and what
waits for what there, is the matter of `uploads.py`: tables change in the order of the steps, pages beside them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear
from lorry.adapters.device.slabs import Demand, SlabAllocator
from lorry.adapters.device.streams import Event
from lorry.adapters.device.tables import Placed, SlotTables, slots_for
from lorry.adapters.device.uploads import Uploads, uploads_to
from lorry.adapters.errors import PoolTooSmall
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.kernels.lora import VECTORS, AdapterPages, vectors_at


@dataclass(eq=False, slots=True)
class _Slot:
    """Books of one slot. offsets: pages of each linear, the vector page of those in `vectors` the last; to_fill: pages
    still to be copied; used: tick of last use.

    slots: all that it has. page_bound: most pages of a linear in the layers, end_bound: at the ends, 0: none.
    copied: an event behind all copies so far. resident: it has passed when all were copied, and the tables are written.
    """

    adapter: CanonicalAdapter  # its pages are dropped when they are there, if they can be read back
    offsets: dict[Linear, list[int]]
    vectors: frozenset[Linear]
    scaling: dict[Linear, float]
    demand: Demand
    to_fill: list[tuple[Linear, int]]
    slots: tuple[int, ...]
    page_bound: int
    end_bound: int
    used: int
    copied: Event | None = None
    resident: bool = False
    users: int = 0
    pinned: bool = False


class PagePool:
    """Fixed memory for adapters. capacity_bytes: of the arena; the tables (see `tables.py`) come on top.

    uploads: the way to the device, by default the one that suits it.
    """

    def __init__(
        self,
        layout: ModelLayout,
        capacity_bytes: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_slots: int = 512,
        uploads: Uploads | None = None,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.max_slots = max_slots
        self._classes, rare = size_classes(layout, dtype)
        sites = (*layout.sites, *layout.ends)
        self._kind = {site: self._classes.index(layout.page_elements(site, dtype)) for site in sites}
        self._vector_kind = {site: self._classes.index(layout.vector_elements(site, dtype)) for site in sites}
        self._slabs = SlabAllocator(self._classes, capacity_bytes // dtype.itemsize, rare)
        arena = torch.empty(self._slabs.slabs * self._slabs.slab_elements, dtype=dtype, device=device)
        self.uploads = uploads or uploads_to(arena.device, max(self._classes, default=0) * dtype.itemsize)
        self._tables = SlotTables(arena, max_slots, layout.layers, self.uploads)
        self._mean_page = (
            sum(layout.page_elements(site, dtype) for site in layout.sites) / len(layout.sites) * dtype.itemsize
        )
        self._slots: dict[int, _Slot] = {}
        self._free_slots = list(reversed(range(max_slots)))
        self._holders: dict[int, tuple[int, Linear, int]] = {}  # offset → (slot, linear, index in its list)
        self._ticks = itertools.count()

    # ---------------------------------------------------------------- sizes

    @property
    def pages(self) -> AdapterPages:
        """What the kernels read; the same tensors for the pool's whole life."""
        return self._tables.pages

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the arena: whole slabs."""
        return self.pages.arena.nbytes

    @property
    def bytes_used(self) -> int:
        return sum(self.bytes_of(books.demand) for books in self._slots.values())

    @property
    def pages_total(self) -> int:
        """The arena in pages of the mean size over this model's sites."""
        return int(self.capacity_bytes / self._mean_page)

    @property
    def pages_used(self) -> int:
        """Bytes in use in the same unit, rounded up, at most `pages_total`."""
        return min(self.pages_total, int(-(-self.bytes_used // self._mean_page)))

    def demand(self, adapters: Iterable[CanonicalAdapter]) -> Demand:
        """What the adapters take together: pages of each size class, and behind them slots."""
        counts, slots = [0] * len(self._classes), 0
        for adapter in adapters:
            for (_, site), linear in adapter.linears.items():
                counts[self._kind[site]] += linear.pages.shape[0]
                counts[self._vector_kind[site]] += linear.vectors is not None
            slots += slots_for(max(map(_entries, adapter.linears.values()), default=0))
        return (*counts, slots)

    def demand_of(self, slot: int) -> Demand:
        return self._slots[slot].demand

    def bytes_of(self, demand: Demand) -> int:
        return sum(n * size for n, size in zip(demand[:-1], self._classes, strict=True)) * self.dtype.itemsize

    def page_bound(self, slots: Iterable[int]) -> int:
        """At least as many pages as resident adapters have together in any one linear of the layers. slots: the first
        ones, or all."""
        return sum(self._slots[slot].page_bound for slot in slots if slot in self._slots)

    def end_bound(self, slots: Iterable[int]) -> int:
        """The same of the embedding and the head; 0: none of the adapters changes these."""
        return sum(self._slots[slot].end_bound for slot in slots if slot in self._slots)

    # ---------------------------------------------------------------- room

    def ever_fits(self, demand: Demand) -> bool:
        """Whether an empty pool could hold adapters that take `demand`."""
        *pages, slots = demand
        return slots <= self.max_slots and self._slabs.ever_fits(tuple(pages))

    def room(self) -> int:
        """How many adapters of rank 16 on every linear an empty pool could hold."""
        counts = [0] * len(self._classes)
        for _, site in self.layout.linears():
            counts[self._kind[site]] += 1

        def too_many(number: int) -> bool:
            return not self.ever_fits(tuple(number * count for count in (*counts, 1)))

        return bisect_left(range(1, self.max_slots + 1), True, key=too_many)

    def too_small(self, demand: Demand) -> PoolTooSmall:
        """The error for a demand that never fits; it names both sizes, in bytes."""
        needed, available = self.bytes_of(demand), self.capacity_bytes
        return PoolTooSmall(
            f"{needed} bytes of adapters, the pinned ones included, do not fit into the pool of {available} bytes"
            f" ({self._slabs.slabs} slabs of {self._slabs.slab_elements * self.dtype.itemsize} bytes, each for pages of"
            f" one size, and {self.max_slots} slots)",
            "adapters",
            needed=needed,
            available=available,
        )

    def least_recently_used(self) -> list[int]:
        """Resident slots, the one whose last use is longest ago first."""
        return sorted((slot for slot in self._slots if self.is_resident(slot)), key=lambda n: self._slots[n].used)

    def make_room(self, demand: Demand, protected: Container[int] = ()) -> list[int] | None:
        """The least recently used slots whose eviction lets new adapters fit that take `demand`.

        None when that is impossible: those in use, pinned, being filled or in `protected` stay. Evicts nothing.
        """
        lru = self.least_recently_used()
        return self.enough(demand, (n for n in lru if self._idle(self._slots[n]) and n not in protected))

    def enough(self, demand: Demand, candidates: Iterable[int]) -> list[int] | None:
        """The first of `candidates` that have to go, used or not, for `demand` to fit; None: all are too few."""
        chosen: list[int] = []
        *pages, slots = demand
        freed = (0,) * len(demand)
        remaining = iter(candidates)
        while len(self._free_slots) + freed[-1] < slots or not self._slabs.fits(tuple(pages), freed[:-1]):
            slot = next(remaining, None)
            if slot is None:
                return None
            chosen.append(slot)
            freed = tuple(a + b for a, b in zip(freed, self._slots[slot].demand, strict=True))
        return chosen

    @staticmethod
    def _idle(books: _Slot) -> bool:
        return books.users == 0 and not books.pinned and books.resident

    # ---------------------------------------------------------------- slots come and go

    def insert(self, adapter: CanonicalAdapter) -> int | None:
        """Make room, reserve, fill and wait; the slot, or None, and nothing changed, when what stays leaves no room.

        Raises PoolTooSmall for an adapter that an empty pool could not hold.
        """
        demand = self.demand([adapter])
        if not self.ever_fits(demand):
            raise self.too_small(demand)
        victims = self.make_room(demand)
        if victims is None:
            return None
        for victim in victims:
            self.evict(victim)
        slot = self.reserve(adapter)
        self.fill(slot, adapter.nbytes)
        while not self.is_resident(slot):
            self.uploads.wait()
            self.fill(slot, adapter.nbytes)
        return slot

    def reserve(self, adapter: CanonicalAdapter) -> int:
        """A slot with all pages that `adapter` takes, still unfilled; there must be room."""
        demand = self.demand([adapter])
        for move in self._slabs.vacate_for(demand[:-1]):
            self._move(move.source, move.target, move.size)
        slots = tuple(self._free_slots.pop() for _ in range(demand[-1]))
        slot = slots[0]
        offsets = {
            (layer, site): [self._slabs.allocate(self._kind[site]) for _ in range(linear.pages.shape[0])]
            for (layer, site), linear in adapter.linears.items()
        }
        vectors = frozenset(key for key, linear in adapter.linears.items() if linear.vectors is not None)
        for key in vectors:
            offsets[key].append(self._slabs.allocate(self._vector_kind[key[1]]))
        pages = [(linear, index) for linear, places in offsets.items() for index in range(len(places))]
        for linear, index in pages:
            self._holders[offsets[linear][index]] = slot, linear, index
        scaling = {key: linear.scaling for key, linear in adapter.linears.items()}
        in_layers, at_ends = (
            max((len(places) for (layer, _), places in offsets.items() if (layer == ENDS) is ends), default=0)
            for ends in (False, True)
        )
        self._slots[slot] = _Slot(
            adapter, offsets, vectors, scaling, demand, pages[::-1], slots, in_layers, at_ends, next(self._ticks)
        )
        self.uploads.take_over()
        return slot

    def fill(self, slot: int, budget: int) -> int:
        """Copy pages until they come to `budget` bytes or all are on their way, at least one page; the bytes copied.

        That is less, down to nothing, while there is no room on the way. To be called until the slot is resident,
        which it becomes here.
        """
        books = self._slots[slot]
        copied = 0
        while books.to_fill and (copied == 0 or copied < budget):
            linear, index = books.to_fill[-1]
            page = books.adapter.linears[linear].page(index)
            offset = books.offsets[linear][index]
            if not self.uploads.page(self.pages.arena[offset : offset + page.numel()], page):
                break
            books.to_fill.pop()
            copied += page.nbytes
        if copied:
            books.copied = self.uploads.mark()
        if not books.resident and not books.to_fill and books.copied is not None and books.copied.query():
            books.resident = self._tables.write(books.slots, self._placed(books))
            if books.resident and self.uploads.reads_back:
                books.adapter = books.adapter.without_pages()
        return copied

    def lacks_copies(self, slot: int) -> bool:
        """Whether pages of a slot are still to be copied; those that are on their way are not."""
        return bool(self._slots[slot].to_fill)

    def evict(self, slot: int) -> None:
        """Free a slot that is neither in use nor pinned; one that is being filled may go too."""
        books = self._slots[slot]
        assert books.users == 0 and not books.pinned
        del self._slots[slot]
        for places in books.offsets.values():
            for offset in places:
                self._slabs.free(offset)
                del self._holders[offset]
        for own in books.slots:
            self._tables.clear(own)
            self._free_slots.append(own)

    def extract(self, slot: int) -> CanonicalAdapter:
        """A resident adapter in host memory, as it was inserted; a copy where the pool has dropped its pages.

        On a GPU it has not: reading them back would wait for the device. What is there takes as many bytes here.
        """
        books = self._slots[slot]
        assert books.resident
        if not self.uploads.reads_back:
            return books.adapter
        return books.adapter.with_linears({linear: self._extract(books, linear) for linear in books.offsets})

    def _extract(self, books: _Slot, linear: Linear) -> CanonicalLinear:
        arena, places, vectors = self.pages.arena, books.offsets[linear], None
        if linear in books.vectors:
            *places, last = places
            vectors = vectors_at(arena, last + VECTORS, self.layout.shape(linear[1])[1]).clone()
        size = self.layout.page_elements(linear[1], self.dtype)
        pages = arena.new_empty(len(places), size)
        for page, offset in zip(pages, places, strict=True):
            page.copy_(arena[offset : offset + size])
        return CanonicalLinear(pages, books.scaling[linear], vectors)

    # ---------------------------------------------------------------- use

    def is_resident(self, slot: int) -> bool:
        """Whether `fill` has seen that all pages of a slot are there, so that the next step may read them."""
        return self._slots[slot].resident

    def all_slots(self, slot: int) -> tuple[int, ...]:
        """The slot and those that go on where its tables end: what a combo must name."""
        return self._slots[slot].slots

    def users(self, slot: int) -> int:
        return self._slots[slot].users

    def acquire(self, slot: int) -> None:
        """Hold a resident slot; counted."""
        assert self.is_resident(slot)
        self._slots[slot].users += 1
        self._slots[slot].used = next(self._ticks)

    def release(self, slot: int) -> None:
        assert self._slots[slot].users > 0
        self._slots[slot].users -= 1
        self._slots[slot].used = next(self._ticks)

    def set_pinned(self, slot: int, pinned: bool) -> None:
        """A pinned slot is never evicted."""
        self._slots[slot].pinned = pinned

    def _move(self, source: int, target: int, size: int) -> None:
        arena = self.pages.arena
        self.uploads.move(arena[target : target + size], arena[source : source + size])
        slot, linear, index = self._holders[target] = self._holders.pop(source)
        books = self._slots[slot]
        books.offsets[linear][index] = target
        if books.resident:
            flag = VECTORS if self._holds_vectors(books, linear, index) else 0
            self._tables.move(books.slots, linear, index, target + flag)

    @staticmethod
    def _holds_vectors(books: _Slot, linear: Linear, index: int) -> bool:
        return linear in books.vectors and index + 1 == len(books.offsets[linear])

    def _kind_of(self, slot: int, linear: Linear, index: int) -> int:
        """The size class of a page."""
        kinds = self._vector_kind if self._holds_vectors(self._slots[slot], linear, index) else self._kind
        return kinds[linear[1]]

    @staticmethod
    def _placed(books: _Slot) -> Placed:
        places = dict(books.offsets)
        for linear in books.vectors:
            *pages, vectors = places[linear]
            places[linear] = [*pages, vectors + VECTORS]
        return {linear: (offsets, books.scaling[linear]) for linear, offsets in places.items()}

    def check(self) -> None:
        """Prove that books, slabs and tables agree; reads the tables back, so only for idle moments and tests."""
        live = {
            offset: (slot, (layer, site), index)
            for slot, books in self._slots.items()
            for (layer, site), places in books.offsets.items()
            for index, offset in enumerate(places)
        }
        assert live == self._holders, "a page has two holders or none"
        self._slabs.check([(offset, self._kind_of(*holder)) for offset, holder in live.items()])
        taken = [slot for books in self._slots.values() for slot in books.slots]
        assert sorted([*taken, *self._free_slots]) == list(range(self.max_slots))
        assert all(books.slots[0] == slot for slot, books in self._slots.items())
        assert all(books.users >= 0 for books in self._slots.values())
        assert not any(books.resident and books.to_fill for books in self._slots.values())
        resident = {books.slots: self._placed(books) for books in self._slots.values() if books.resident}
        self._tables.check(resident, self._free_slots)
        assert self.bytes_used <= self.capacity_bytes


def size_classes(layout: ModelLayout, dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """Elements of all pages that there can be, each size once and sorted; those of them that only the ends have."""
    sizes, common = set[int](), set[int]()
    for site in (*layout.sites, *layout.ends):
        own = {layout.page_elements(site, dtype), layout.vector_elements(site, dtype)}
        sizes |= own
        common |= own if site in layout.sites else set()
    return sorted(sizes), sorted(sizes - common)


def _entries(linear: CanonicalLinear) -> int:
    """Of a linear in the tables."""
    return linear.pages.shape[0] + (linear.vectors is not None)
