"""Pages on their way to a device that lags behind: no step reads what is not there, or no longer."""

from __future__ import annotations

from random import Random

import pytest
import torch
from fake_device import FakeDevice, FakeEvent, Operation
from hypothesis import given, settings
from hypothesis import strategies as st
from random_adapters import EVERYWHERE, LARGEST, LAYOUT, adapter, assert_holds, assert_page, assert_tables

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.device.pool import PagePool
from lorry.adapters.device.ring import ALIGNMENT, Ring
from lorry.adapters.device.uploads import AtOnce, Beside
from lorry.adapters.layout import Linear


class House:
    """A pool on a fake device. resident, filling: what was put into each slot; `resident` may be read by steps."""

    def __init__(self, capacity: int = 24 * LARGEST, max_slots: int = 6, staging: int = 4 * LARGEST) -> None:
        self.device = FakeDevice()
        ring = self.device.pin(torch.zeros(staging, dtype=torch.uint8))
        uploads = Beside(self.device.steps, self.device.copies, ring)
        self.pool = PagePool(LAYOUT, capacity, max_slots=max_slots, uploads=uploads)
        self.pool.pages.arena.fill_(torch.nan)
        self.resident: dict[int, CanonicalAdapter] = {}
        self.filling: dict[int, CanonicalAdapter] = {}
        self.seed = 0

    def reserve(self, ranks: dict[Linear, int]) -> int | None:
        """A slot for a new adapter, idle ones evicted as it needs; None: no room."""
        self.seed += 1
        new = adapter(self.seed, ranks)
        victims = self.pool.make_room(self.pool.demand([new]))
        if victims is None:
            return None
        for victim in victims:
            self.evict(victim)
        slot = self.pool.reserve(new)
        self.filling[slot] = new
        return slot

    def fill(self, slot: int, budget: int = 1 << 20) -> int:
        copied = self.pool.fill(slot, budget)
        if self.pool.is_resident(slot):
            content = self.resident[slot] = self.filling.pop(slot)
            saved = self.pool.extract(slot)
            assert saved.revision == content.revision and saved.linears.keys() == content.linears.keys()
            assert all(torch.equal(saved.linears[key].pages, it.pages) for key, it in content.linears.items())
            self.step([slot])
        return copied

    def evict(self, slot: int) -> None:
        self.pool.evict(slot)
        self.resident.pop(slot, None)
        self.filling.pop(slot, None)

    def step(self, slots: list[int]) -> None:
        """Enqueue a step that reads the tables and pages of resident slots, one by one."""
        expected = [(self.pool.all_slots(slot), self.resident[slot]) for slot in slots]
        self.device.steps.enqueue(self._step(expected))

    def _step(self, expected: list[tuple[tuple[int, ...], CanonicalAdapter]]) -> Operation:
        pages = self.pool.pages
        for slots, content in expected:
            found = assert_tables(pages, slots, content)
            yield True
            for offset, page in found:
                assert_page(pages.arena, offset, page)
                yield True

    def settle(self) -> None:
        """Everything gets to where it should be."""
        for slot in list(self.filling):
            for _ in range(64 + 8):  # pages at most, one a call at least, and the tables of two slots
                if slot in self.filling:
                    self.fill(slot)
                    self.device.drain()
            assert slot in self.resident, "what is filled becomes resident"
        self.step(list(self.resident))
        self.device.drain()
        self.pool.check()
        for slot, expected in self.resident.items():
            assert_holds(self.pool, slot, expected)


@pytest.mark.parametrize("seed", range(16))
def test_random_lives(seed: int) -> None:
    """Adapters come, move and go, steps read them, and now one stream of the device is ahead, now the other."""
    rng = Random(seed)
    house = House(rng.choice([8, 24, 40]) * LARGEST, rng.choice([3, 99]), rng.choice([1, 2, 5, 20]) * LARGEST)
    ahead, behind = house.device.steps, house.device.copies
    for _ in range(1500):
        what = rng.random()
        if what < 0.02:
            scatter(house, rng)
        elif what < 0.2:
            ranks = [1, 16, 17, 40] if rng.random() < 0.9 else [272, 280]
            house.reserve({linear: rng.choice(ranks) for linear in rng.sample(EVERYWHERE, rng.randint(1, 3))})
        elif what < 0.45:
            budget = rng.randint(1, 12) * LARGEST
            for slot in rng.sample(sorted(house.filling), min(3, len(house.filling))):
                copied = house.fill(slot, budget)
                assert copied < budget + LARGEST
                budget = max(1, budget - copied)
        elif what < 0.6:
            house.step(rng.sample(sorted(house.resident), min(3, len(house.resident))))
        elif what < 0.65 and (slots := [*house.filling, *house.resident]):
            house.evict(rng.choice(slots))
        elif what < 0.7:
            ahead, behind = behind, ahead
        else:
            parts = rng.choice([1, 10, 100])
            while parts and (ahead.advance() or (rng.random() < 0.5 and behind.advance())):
                parts -= 1
    house.settle()


def scatter(house: House, rng: Random) -> None:
    """One-page adapters wherever there is room, of which many go again; others then need pages to move."""
    for site, keep in (("k_proj", 0.4), ("down_proj", 1.0)):
        while house.pool.make_room(house.pool.demand([adapter(0, {(1, site): 16})])) == []:
            slot = house.reserve({(1, site): 16})
            assert slot is not None
            house.fill(slot)
            if rng.random() < 0.5:
                house.device.drain(rng.random() < 0.5)
        for slot in list(house.filling):
            house.fill(slot)
        for slot in [*house.filling, *house.resident]:
            if rng.random() > keep:
                house.evict(slot)


ALL_16 = dict.fromkeys(LAYOUT.linears(), 16)


def test_a_slot_is_resident_when_its_last_copy_has_run() -> None:
    house = House(staging=64 * LARGEST)
    slot = house.reserve(ALL_16)
    assert slot is not None
    house.device.end_steps()
    parts = 0
    while house.fill(slot) or slot in house.filling:
        assert not house.device.copies.idle and house.device.copies.advance()
        parts += 1
    assert parts > 3 * len(ALL_16) and not house.device.copies.advance(), "the event is the last that runs"
    assert bool((house.pool.pages.offsets == -1).all()), "the tables are behind the steps"
    house.settle()


def test_pages_are_not_overwritten_before_the_steps_that_read_them() -> None:
    house = House(8 * LARGEST, max_slots=1, staging=64 * LARGEST)
    old = house.reserve(ALL_16)
    assert old is not None
    house.settle()
    house.step([old])
    house.step([old])
    new = house.reserve(ALL_16)
    assert new is not None
    house.fill(new)
    arena = house.pool.pages.arena.view(torch.int16)
    before = arena.clone()
    assert not house.device.copies.advance() and not house.device.copies.idle
    for _ in range(15):
        assert house.device.steps.advance()
        assert not house.device.copies.advance(), "there are steps that read the old pages"
    assert torch.equal(before, arena)
    house.settle()
    assert not torch.equal(before, arena)


@pytest.mark.parametrize("copies_first", [False, True])
@pytest.mark.parametrize("under_way", [0, 2, 20], ids=lambda parts: f"{parts} parts copied")
def test_pages_move_behind_their_copies_and_before_what_takes_their_place(under_way: int, copies_first: bool) -> None:
    house = House(12 * 8 * LARGEST, max_slots=99, staging=64 * LARGEST)
    small = []
    while house.pool.make_room(house.pool.demand([adapter(0, {(0, "k_proj"): 16})])) == []:
        small.append(house.reserve({(0, "k_proj"): 16}))
        if len(small) == 99:
            break
    assert None not in small
    for slot in small[:-2]:
        if slot % 4:
            house.evict(slot)
    house.settle()
    begun = house.reserve({(1, "k_proj"): 64})
    assert begun is not None
    house.fill(begun, 2 * LARGEST)
    for _ in range(under_way):
        house.device.copies.advance()
    offsets = house.pool.pages.offsets.clone()
    house.step(list(house.resident))
    while (big := house.reserve({(0, "down_proj"): 64, (1, "down_proj"): 64})) is not None:
        house.fill(big)
        house.step(list(house.resident))
    house.device.drain(copies_first)
    house.settle()
    assert not torch.equal(offsets[list(house.resident)[:-4]], house.pool.pages.offsets[list(house.resident)[:-4]])


def test_tables_wait_for_room_on_the_way() -> None:
    house = House(staging=LARGEST)
    first, second = house.reserve({(0, "down_proj"): 16}), house.reserve({(1, "down_proj"): 16})
    assert first is not None and second is not None
    assert (house.fill(first), house.fill(second)) == (LARGEST, 0)
    house.device.drain()
    assert house.fill(second) == LARGEST
    house.fill(first)
    assert first in house.filling, "its page is there, but the ring is full"
    house.settle()


def test_insert_waits_for_the_device() -> None:
    house = House(staging=LARGEST)
    slot = house.pool.insert(adapter(1, ALL_16))
    assert slot is not None and house.pool.is_resident(slot)
    house.device.end_steps()
    assert_holds(house.pool, slot, adapter(1, ALL_16))


def test_page_bound() -> None:
    house = House(40 * LARGEST)
    narrow, wide = house.reserve({(0, "q_proj"): 16, (1, "o_proj"): 33}), house.reserve({(0, "k_proj"): 64})
    assert narrow is not None and wide is not None
    assert [house.pool.page_bound(slots) for slots in ([], [narrow], [wide], [narrow, wide])] == [0, 3, 4, 7]


# ---------------------------------------------------------------- the ring


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.one_of(st.integers(1, 9 * ALIGNMENT), st.sampled_from(["close", "pass"])), max_size=80),
)
def test_a_piece_is_free_when_its_event_has_passed(blocks: int, moves: list[int | str]) -> None:
    memory = torch.zeros(blocks * ALIGNMENT, dtype=torch.uint8)
    ring, device = Ring(memory), FakeDevice()
    held: list[tuple[FakeEvent | None, torch.Tensor, int]] = []
    number = 0
    for move in moves:
        if move == "close" and any(owner is None for owner, _, _ in held):
            event = FakeEvent(device)
            ring.close(event)
            held = [(owner or event, piece, value) for owner, piece, value in held]
        elif move == "pass":
            waiting = [owner for owner, _, _ in held if owner is not None]
            if waiting:
                waiting[0].passed = True
                held = [entry for entry in held if entry[0] is not waiting[0]]
        elif isinstance(move, int) and move <= len(memory):
            piece = ring.take(move)
            assert piece is not None or held, "an empty ring takes the largest piece"
            if piece is not None:
                assert piece.shape == (move,)
                number = number % 250 + 1
                piece.fill_(number)
                held.append((None, piece, number))
        for _, piece, value in held:
            assert bool((piece == value).all()), "a piece was given to two"


def test_long_steps_have_more_copied_between_them() -> None:
    budgets = [AtOnce().budget(step) for step in (0.0, 0.001, 0.05, 0.08, 60.0)]
    assert budgets == [2 << 20, 2 << 20, 4 << 20, int(6.4 * (1 << 20)), 8 << 20]
