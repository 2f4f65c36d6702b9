"""Pages of a few sizes in one arena: a slab allocator that can compact.

    arena:   | slab 0: A A A A · | slab 1: B B B B B B | slab 2: free | …

The arena is cut into equal slabs. A slab serves pages of one size class at a time and is free again when its last page
is. Pages can be moved within their class, so a demand fits if and only if

    Σ_c ⌈(live_c + demand_c) / per_slab_c⌉ ≤ slabs

Source: Bonwick, The Slab Allocator (USENIX 1994).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

ALIGNMENT = 16  # elements; GPU kernels load 16 bytes of a page at a time, and sizes of pages are multiples of it

Demand = tuple[int, ...]
"""Pages of each size class."""


@dataclass(frozen=True, slots=True)
class Move:
    """`size` elements go from `source` to `target`; the two never overlap."""

    source: int
    target: int
    size: int


@dataclass(slots=True)
class _Slab:
    """Owned by class `kind`; free: indices of its free pages, the next one last."""

    kind: int
    free: list[int] = field(default_factory=list)


def slab_elements(sizes: Sequence[int], capacity: int, rare: Sequence[int] = ()) -> int:
    """Elements of one slab for page `sizes` in an arena of `capacity`.

    8 to 32 of the largest pages, less when that would leave fewer than four slabs for each class; among these the
    smallest slab whose waste (behind its last page, behind the last slab) is within 1% of the least. Pages of the sizes
    in `rare` fit as well where the arena is large enough for that.
    """
    largest = max(sizes)
    ceiling = capacity // (4 * len(set(sizes))) // ALIGNMENT * ALIGNMENT
    low = max(largest, min(max(8 * largest, *rare), ceiling)) if rare else max(largest, min(8 * largest, ceiling))
    high = max(low, min(32 * largest, ceiling))
    candidates = {k * size for size in sizes for k in range(-(-low // size), high // size + 1)} or {low}

    def waste(slab: int) -> float:
        inside = sum(slab % size / slab for size in sizes) / len(sizes)
        return inside + (capacity % slab / capacity if capacity >= slab else 0.0)

    least = min(map(waste, candidates))
    return min(slab for slab in candidates if waste(slab) <= least + 0.01)


class SlabAllocator:
    """Books of the arena. sizes: elements of a page of each class; all offsets are in elements.

    rare: those of the sizes that slabs are not made for; one that is larger than a slab has no room.
    """

    def __init__(self, sizes: Sequence[int], capacity: int, rare: Sequence[int] = ()) -> None:
        self.sizes = tuple(sizes)
        self.slab_elements = slab_elements([size for size in sizes if size not in rare], capacity, rare)
        self.slabs = capacity // self.slab_elements
        self.per_slab = tuple(self.slab_elements // size for size in sizes)
        self.live = [0] * len(sizes)
        self._owned: dict[int, _Slab] = {}
        self._free = list(range(self.slabs))  # a heap: low slabs first, so that untouched memory stays untouched
        self._partial: list[set[int]] = [set() for _ in sizes]

    def fits(self, demand: Demand, freed: Demand | None = None) -> bool:
        """Whether `demand` can be allocated now, or once `freed` has been."""
        gone = freed or (0,) * len(self.sizes)
        wanted = zip(self.live, demand, gone, self.per_slab, strict=True)
        return sum(self._slabs_of(live + more - less, per) for live, more, less, per in wanted) <= self.slabs

    def ever_fits(self, demand: Demand) -> bool:
        """Whether an empty arena could hold `demand`."""
        return sum(map(self._slabs_of, demand, self.per_slab)) <= self.slabs

    def _slabs_of(self, pages: int, per_slab: int) -> int:
        """Slabs for so many pages of one class; more than there are, where a slab is too small for one."""
        if per_slab == 0:
            return (self.slabs + 1) * pages
        return -(-pages // per_slab)

    def vacate_for(self, demand: Demand) -> list[Move]:
        """Vacate slabs until `demand`, which fits, can be allocated page by page; the moves, to be made in order."""
        assert self.fits(demand)
        moves: list[Move] = []
        while sum(self._slabs_short(kind, pages) for kind, pages in enumerate(demand)) > len(self._free):
            kinds = [k for k, per in enumerate(self.per_slab) if per]
            kind = max(kinds, key=lambda k: (self._spare(k) - demand[k]) // self.per_slab[k])
            moves += self._vacate(kind)
        return moves

    def allocate(self, kind: int) -> int:
        """Offset of a page of class `kind`; there must be room."""
        partial = self._partial[kind]
        if partial:
            number = min(partial)
        else:
            number = heapq.heappop(self._free)
            self._owned[number] = _Slab(kind, list(reversed(range(self.per_slab[kind]))))
            partial.add(number)
        slab = self._owned[number]
        page = slab.free.pop()
        if not slab.free:
            partial.discard(number)
        self.live[kind] += 1
        return number * self.slab_elements + page * self.sizes[kind]

    def free(self, offset: int) -> None:
        """Give a page back."""
        number, inside = divmod(offset, self.slab_elements)
        slab = self._owned[number]
        page, rest = divmod(inside, self.sizes[slab.kind])
        assert rest == 0 and page not in slab.free
        slab.free.append(page)
        self.live[slab.kind] -= 1
        if len(slab.free) == self.per_slab[slab.kind]:
            del self._owned[number]
            self._partial[slab.kind].discard(number)
            heapq.heappush(self._free, number)
        else:
            self._partial[slab.kind].add(number)

    def _spare(self, kind: int) -> int:
        """Free pages in slabs of class `kind`."""
        return sum(len(self._owned[number].free) for number in self._partial[kind])

    def _slabs_short(self, kind: int, pages: int) -> int:
        return self._slabs_of(max(0, pages - self._spare(kind)), self.per_slab[kind])

    def _vacate(self, kind: int) -> list[Move]:
        """Empty the class's emptiest slab into its others."""
        number = max(self._partial[kind], key=lambda n: len(self._owned[n].free))
        self._partial[kind].discard(number)
        free = set(self._owned[number].free)
        moves = []
        for page in set(range(self.per_slab[kind])) - free:
            source = number * self.slab_elements + page * self.sizes[kind]
            moves.append(Move(source, self.allocate(kind), self.sizes[kind]))
        for move in moves:
            self.free(move.source)
        return moves

    def check(self, live: Sequence[tuple[int, int]]) -> None:
        """Prove the books against the live pages, given as (offset, class)."""
        pages = sorted((offset, offset + self.sizes[kind], kind) for offset, kind in live)
        for (_, end, _), (start, _, _) in pairwise(pages):
            assert end <= start, "two live pages overlap"
        used: dict[int, int] = {}
        for start, end, kind in pages:
            number = start // self.slab_elements
            assert end <= (number + 1) * self.slab_elements, "a page crosses its slab's end"
            assert number in self._owned and self._owned[number].kind == kind, "a page in a slab of another class"
            assert (start % self.slab_elements) % self.sizes[kind] == 0
            used[number] = used.get(number, 0) + 1
        assert sorted([*self._owned, *self._free]) == list(range(self.slabs)), "free + used slabs are not the arena"
        for number, slab in self._owned.items():
            assert len(set(slab.free)) == len(slab.free)
            assert used.get(number, 0) + len(slab.free) == self.per_slab[slab.kind], "free + used pages ≠ a slab"
            assert used.get(number, 0) > 0, "an empty slab is not free"
            assert (number in self._partial[slab.kind]) == bool(slab.free)
        counted = [sum(1 for _, k in live if k == kind) for kind in range(len(self.sizes))]
        assert counted == self.live
