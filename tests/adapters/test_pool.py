"""The page pool against a model of itself: whatever comes and goes, pages hold what was put there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from random_adapters import LARGEST, LAYOUT, RANKS, adapter, assert_holds

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.device.pool import PagePool
from lorry.adapters.device.slabs import SlabAllocator, slab_elements
from lorry.adapters.errors import PoolTooSmall
from lorry.adapters.layout import ENDS, Linear


class PoolMachine(RuleBasedStateMachine):
    """Random life of a pool. `resident` and `filling` say what must be there, `uses` how often it is held."""

    @initialize(capacity=st.integers(0, 90 * LARGEST), max_slots=st.integers(1, 6))
    def start(self, capacity: int, max_slots: int) -> None:
        self.pool = PagePool(LAYOUT, capacity, max_slots=max_slots)
        self.pool.pages.arena.fill_(torch.nan)
        assert self.pool.capacity_bytes <= capacity
        self.resident: dict[int, CanonicalAdapter] = {}
        self.filling: dict[int, CanonicalAdapter] = {}
        self.uses: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.lru: list[int] = []
        self.seed = 0

    def _slot(self, data: Any, among: Any) -> int:
        return int(data.draw(st.sampled_from(sorted(among))))

    def _idle(self) -> list[int]:
        return [slot for slot in self.lru if not self.uses[slot] and slot not in self.pinned and slot in self.resident]

    def _forget(self, slot: int) -> None:
        self.resident.pop(slot, None)
        self.filling.pop(slot, None)
        self.lru.remove(slot)

    def _enter(self, slot: int) -> None:
        self.uses[slot] = 0
        self.lru.append(slot)

    @rule(ranks=RANKS)
    def insert(self, ranks: dict[Linear, int]) -> None:
        self.seed += 1
        new = adapter(self.seed, ranks)
        demand = self.pool.demand([new])
        if not self.pool.ever_fits(demand):
            with pytest.raises(PoolTooSmall, match=str(new.nbytes)):
                self.pool.insert(new)
            return
        before, idle = set(self.resident), self._idle()
        slot = self.pool.insert(new)
        if slot is None:
            assert self.pool.enough(demand, idle) is None
            return
        gone = before - set(self.pool.least_recently_used())
        gone |= {slot} & before
        assert gone == set(idle[: len(gone)]), "the least recently used go first"
        for old in gone:
            self._forget(old)
        self._enter(slot)
        self.resident[slot] = new

    @rule(ranks=RANKS)
    def reserve(self, ranks: dict[Linear, int]) -> None:
        self.seed += 1
        new = adapter(self.seed, ranks)
        if self.pool.make_room(self.pool.demand([new])) == []:
            slot = self.pool.reserve(new)
            self._enter(slot)
            self.filling[slot] = new

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), budget=st.integers(0, 6 * LARGEST))
    def fill(self, data: Any, budget: int) -> None:
        slot = self._slot(data, self.filling)
        copied = self.pool.fill(slot, budget)
        assert 0 < copied < max(budget, 1) + LARGEST
        if self.pool.is_resident(slot):
            self.resident[slot] = self.filling.pop(slot)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def acquire(self, data: Any) -> None:
        slot = self._slot(data, self.resident)
        self.pool.acquire(slot)
        self.uses[slot] += 1
        self.lru.append(self.lru.pop(self.lru.index(slot)))

    @precondition(lambda self: any(self.uses[slot] for slot in self.resident))
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        slot = self._slot(data, [slot for slot in self.resident if self.uses[slot]])
        self.pool.release(slot)
        self.uses[slot] -= 1
        self.lru.append(self.lru.pop(self.lru.index(slot)))

    @precondition(lambda self: self.resident)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: Any, pinned: bool) -> None:
        slot = self._slot(data, self.resident)
        self.pool.set_pinned(slot, pinned)
        self.pinned = self.pinned | {slot} if pinned else self.pinned - {slot}

    @precondition(lambda self: self.filling or self._idle())
    @rule(data=st.data())
    def evict(self, data: Any) -> None:
        slot = self._slot(data, [*self.filling, *self._idle()])
        self.pool.evict(slot)
        self._forget(slot)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def extract(self, data: Any) -> None:
        slot = self._slot(data, self.resident)
        copy, original = self.pool.extract(slot), self.resident[slot]
        assert copy.linears.keys() == original.linears.keys() and copy.revision == original.revision
        assert all(torch.equal(copy.linears[key].pages, original.linears[key].pages) for key in original.linears)
        assert all(copy.linears[key].scaling == original.linears[key].scaling for key in original.linears)

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        for slot, expected in self.resident.items():
            assert_holds(self.pool, slot, expected)
        used = sum(item.nbytes for item in [*self.resident.values(), *self.filling.values()])
        assert self.pool.bytes_used == used <= self.pool.capacity_bytes
        assert 0 <= self.pool.pages_used <= self.pool.pages_total


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=120), st.randoms(use_true_random=False))
def test_whatever_fits_by_count_can_be_allocated(steps: list[tuple[int, bool]], random: Any) -> None:
    """Fragmentation never refuses: pages move within their class until the demand fits."""
    sizes = (5, 7, 12)
    slabs = SlabAllocator(sizes, 12 * 40)
    memory: dict[int, int] = {}  # offset → page id
    kinds: dict[int, int] = {}
    for page, (kind, freeing) in enumerate(steps):
        if freeing and memory:
            offset = random.choice(sorted(memory))
            slabs.free(offset)
            del kinds[memory.pop(offset)]
        demand = tuple(int(kind == other) * 3 for other in range(3))
        if slabs.fits(demand):
            for move in slabs.vacate_for(demand):
                assert abs(move.source - move.target) >= move.size
                assert move.target not in memory
                memory[move.target] = memory.pop(move.source)
            for number in range(3):
                offset = slabs.allocate(kind)
                assert offset not in memory
                memory[offset] = page * 3 + number
                kinds[page * 3 + number] = kind
        slabs.check([(offset, kinds[item]) for offset, item in memory.items()])


def test_compaction_moves_pages_that_are_in_use() -> None:
    pool = PagePool(LAYOUT, 6 * 8 * LARGEST)
    small: list[int] = []
    while pool.make_room(pool.demand([adapter(0, {(0, "k_proj"): 16})])) == []:
        slot = pool.insert(adapter(len(small), {(0, "k_proj"): 16}))
        assert slot is not None
        small.append(slot)
    expected = {}
    for seed, slot in enumerate(small):
        if seed % 2:
            pool.evict(slot)
        else:
            pool.acquire(slot)
            expected[slot] = adapter(seed, {(0, "k_proj"): 16})
    before = pool.pages.offsets[list(expected)].clone()
    big = adapter(99, {(layer, "down_proj"): 64 for layer in range(2)})
    slot = pool.insert(big)
    assert slot is not None
    pool.check()
    assert not torch.equal(before, pool.pages.offsets[list(expected)]), "the test is too easy"
    assert_holds(pool, slot, big)
    for held, content in expected.items():
        assert_holds(pool, held, content)


def test_room_for_adapters_of_rank_16() -> None:
    one = adapter(0, dict.fromkeys(LAYOUT.linears(), 16))
    for capacity, slots in ((0, 7), (one.nbytes * 5, 7), (one.nbytes * 50, 7), (one.nbytes * 50, 64)):
        pool = PagePool(LAYOUT, capacity, max_slots=slots)
        filled = 0
        while pool._free_slots and pool.make_room(pool.demand([one])) == []:
            pool.reserve(one)
            filled += 1
        assert pool.room() == filled <= slots


def test_pages_of_a_large_head_fit_where_slabs_are_large_enough() -> None:
    layout = replace(LAYOUT, ends={"lm_head": (37, 1003)})
    head = adapter(0, {(ENDS, "lm_head"): 40, (0, "q_proj"): 16}, layout=layout)
    small = PagePool(layout, 100 * LARGEST)
    assert small.room() > 2
    with pytest.raises(PoolTooSmall, match=r"slabs of \d+ bytes, each for pages of one size"):
        small.insert(head)
    large = PagePool(layout, 1000 * LARGEST)
    slots = [large.insert(head), large.insert(adapter(1, {(1, "q_proj"): 64}, layout=layout))]
    large.check()
    assert None not in slots and large.end_bound(slots) == 3 and large.page_bound(slots) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn])
def test_a_pool_that_just_holds_one(dtype: torch.dtype) -> None:
    one = adapter(1, {(0, "down_proj"): 16}, dtype)
    pool = PagePool(LAYOUT, one.nbytes, dtype)
    assert pool.insert(one) is not None
    assert (pool.bytes_used, pool.pages_used) == (one.nbytes, pool.pages_total)
    other = pool.insert(adapter(2, {(1, "q_proj"): 16}, dtype))
    assert other is not None
    pool.acquire(other)
    assert pool.insert(one) is None
    pool.check()
    with pytest.raises(PoolTooSmall, match="do not fit") as refused:
        pool.insert(adapter(3, {(0, "down_proj"): 17}, dtype))
    assert refused.value.details == {"needed": str(2 * one.nbytes), "available": str(pool.capacity_bytes)}


@pytest.mark.parametrize("mebibytes", [1, 16, 256])
@pytest.mark.parametrize(
    "shapes",
    [
        ((576, 576), (576, 192), (576, 1536), (1536, 576)),
        ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)),
        ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
        ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)),
    ],
    ids=str,
)
def test_slabs_waste_little(shapes: tuple[tuple[int, int], ...], mebibytes: int) -> None:
    sizes = sorted({16 * (k + n) for k, n in shapes})
    capacity = mebibytes << 19
    slab = slab_elements(sizes, capacity)
    assert all(slab >= size for size in sizes)
    if capacity >= 4 * len(sizes) * 8 * max(sizes):
        assert slab >= 8 * max(sizes)
        assert sum(slab % size for size in sizes) / len(sizes) <= 0.03 * slab
        assert capacity // slab >= 4 * len(sizes)
