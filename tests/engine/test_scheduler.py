"""The scheduler alone: random lives of requests, its invariants after every step, and each rule by itself."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator
from lorry.server.cache.prefix import PrefixIndex
from lorry.server.engine.batch import combo_runs
from lorry.server.engine.messages import AdapterRef, Generate, SamplingParams, StoppingParams
from lorry.server.engine.plan import Plan, first_share
from lorry.server.engine.scheduler import MOST_UNREADY, PROTECT_AFTER, Limits, Scheduler
from lorry.server.engine.sequence import Request, Sequence, Status
from lorry.server.errors import AlreadyExists, InvalidField, LorryError, MalformedAdapter, OutOfMemory, PromptTooLong
from lorry.server.params import BeamSearch, ContrastiveSearch


@dataclass(eq=False)
class SlotLease:
    adapter: str
    slots: dict[str, int]
    pins: int = 0
    released: bool = False
    absent: bool = False

    @property
    def revisions(self) -> tuple[str, ...]:
        return ("r",)

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """An adapter named "1x" is invoked by token 1."""
        return (int(self.adapter[0]),) if self.adapter[0].isdigit() else ()

    @property
    def combo(self) -> tuple[tuple[int, float], ...]:
        return ((self.slots[self.adapter], 1.0),)


@dataclass
class SlotResidency:
    """Adapters become resident one `tick` after they are wished for, in the place of an unpinned one."""

    capacity: int
    broken: frozenset[str] = frozenset()
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    wished: list[str] = field(default_factory=list)
    leases: list[SlotLease] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)

    def lease(self, adapter: str) -> SlotLease:
        lease = SlotLease(adapter, self.slots)
        self.leases.append(lease)
        return lease

    def ready(self, lease: SlotLease) -> bool:
        if lease.adapter in self.broken:
            error: LorryError = MalformedAdapter(f"{lease.adapter} is broken")
            raise error
        if lease.adapter in self.resident:
            self.resident.move_to_end(lease.adapter)
            return True
        if lease.adapter not in self.wished:
            self.wished.append(lease.adapter)
        return False

    def tick(self) -> None:
        pinned = {lease.adapter for lease in self.leases if lease.pins}
        for adapter in list(self.wished):
            if len(self.resident) == self.capacity:
                victim = next((each for each in self.resident if each not in pinned), None)
                if victim is None:
                    return
                del self.resident[victim]
                del self.slots[victim]
            self.wished.remove(adapter)
            self.resident[adapter] = None
            self.slots[adapter] = min(set(range(self.capacity)) - set(self.slots.values()))

    def pin(self, lease: SlotLease) -> None:
        assert lease.adapter in self.resident and not lease.released and lease.pins == 0
        lease.pins += 1

    def unpin(self, lease: SlotLease) -> None:
        assert lease.pins == 1
        lease.pins -= 1

    def release(self, lease: SlotLease) -> None:
        assert lease.pins == 0 and not lease.released
        lease.released = True
        self.leases.remove(lease)


@dataclass
class House:
    """A scheduler, and the rest of an engine as far as it needs one: each step appends a token to who decides."""

    blocks: int = 40
    max_running: int = 6
    token_budget: int = 48
    context_length: int = 300
    slots: int = 2
    broken: frozenset[str] = frozenset()
    steps: int = 0
    orders: int = 0
    ended: list[str] = field(default_factory=list)
    failed: dict[str, LorryError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.allocator = BlockAllocator(self.blocks)
        self.residency = SlotResidency(self.slots, self.broken)
        limits = Limits(self.max_running, self.token_budget, self.context_length)
        self.scheduler = Scheduler(limits, self.allocator, PrefixIndex(self.allocator), self.residency)

    def submit(
        self,
        name: str,
        prompt: int | list[int] = 10,
        new: int = 3,
        *,
        n: int = 1,
        priority: int = 0,
        adapter: str = "",
        time_limit: float | None = None,
        deadline: float | None = None,
        score_from: int | None = None,
        search: BeamSearch | ContrastiveSearch | None = None,
    ) -> Request:
        tokens = prompt if isinstance(prompt, list) else [self.orders + 7 * i for i in range(prompt)]
        message = Generate(
            name,
            tokens,
            SamplingParams(n=n, search=search),
            StoppingParams(new, time_limit=time_limit),
            adapters=(AdapterRef(adapter),) if adapter else (),
            priority=priority,
            deadline=deadline,
            prompt_logprobs_from=score_from,
        )
        self.orders += 1
        request = Request(message, self.orders, self.residency.lease(adapter) if adapter else None)
        try:
            self.scheduler.add(request)
        except LorryError:
            if request.lease is not None:
                self.residency.release(request.lease)
            raise
        return request

    def step(self) -> Plan:
        self.steps += 1
        plan = self.scheduler.plan(float(self.steps))
        for request, error in plan.failed:
            self.failed[request.id] = error
        written: set[int] = set()
        for piece in plan.pieces:
            sequence = piece.sequence
            assert sequence.status is Status.RUNNING and piece.start == sequence.computed < piece.end <= sequence.length
            for position in range(piece.start, piece.end):
                block = sequence.table.blocks[position // BLOCK_SIZE]
                assert self.allocator.references(block) == 1, "a shared block would be written"
                slot = block * BLOCK_SIZE + position % BLOCK_SIZE
                assert slot not in written, "a slot would be written twice"
                written.add(slot)
        prefill = sum(piece.end - piece.start for piece in plan.pieces)
        assert prefill <= max(self.token_budget, len(plan.pieces) + BLOCK_SIZE)
        combos = [combo_runs([piece])[-1][1] for piece in plan.pieces]
        assert sum(a != b for a, b in itertools.pairwise(combos)) == max(0, len(set(combos)) - 1)
        for piece in plan.pieces:
            self.scheduler.launched(piece)
            self.scheduler.landed(piece)
            request = piece.sequence.request
            if request.observed is not None:
                assert piece.start <= request.observed or request.observed == len(request.prompt), "states are missing"
                request.observed = max(request.observed, min(piece.end, len(request.prompt)))
            if piece.end == piece.sequence.length and request.search is None:
                self.decide(piece.sequence)
        for part in plan.parts():
            request = part[0].sequence.request
            if request.search is not None and part[0].end == part[0].sequence.length:
                assert [piece.sequence for piece in part] == request.live, "a search is decided in part"
                self.decide_together(request)
        self.residency.tick()
        self.scheduler.check()
        return plan

    def decide(self, sequence: Sequence) -> None:
        request = sequence.request
        born = [sequence]
        if request.pending:
            sequence.index, *others = request.pending
            request.pending = []
            born += [self.scheduler.fork(sequence, index) for index in others]
        for each in born:
            each.output.append(1000 + each.index * 100 + len(each.output))
            new = request.message.stopping.max_new_tokens + each.index
            if len(each.output) >= new or each.length >= self.context_length:
                self.scheduler.finish(each)
                if not request.live:
                    self.ended.append(request.id)

    def decide_together(self, request: Request) -> None:
        """Drop some sequences of a search, all but one of a contrastive one, and fork the others until it is as wide as
        it may be."""
        live, random_ = request.live, random.Random(self.steps)
        if len(live[0].output) + 1 >= request.message.stopping.max_new_tokens:
            self.scheduler.end(request)
            self.ended.append(request.id)
            return
        kept = random_.sample(live, 1 if request.observed is not None else random_.randint(1, len(live)))
        for each in live:
            if each not in kept:
                self.scheduler.finish(each)
        for used in range(1, request.rows - len(kept) + 1):
            index = max(each.index for each in live) + used
            kept.append(self.scheduler.fork(random_.choice(kept), index))
        for number, each in enumerate(kept):
            each.output.append(1000 * self.steps + number)

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.requests:
                break
            self.step()
        assert not self.scheduler.requests, "requests starve"
        assert self.allocator.available == self.blocks
        assert self.residency.leases == []


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(8, 40),
    max_running=st.integers(3, 9),
    token_budget=st.integers(1, 90),
    slots=st.integers(1, 3),
)
def test_every_request_ends_whatever_happens(
    seed: int, blocks: int, max_running: int, token_budget: int, slots: int
) -> None:
    random_ = random.Random(seed)
    house = House(blocks, max_running, token_budget, blocks * BLOCK_SIZE, slots, broken=frozenset({"broken"}))
    names = []
    for step in range(120):
        if random_.random() < 0.5:
            name = str(step)
            try:
                house.submit(
                    name,
                    [random_.randrange(2)] * random_.choice([1, 15, 16, 17, 40, 90]) + [step] * random_.randrange(3),
                    random_.choice([1, 2, 17, 40]),
                    n=random_.choice([1, 1, 1, 2, 3]),
                    priority=random_.choice([0, 0, 1, -1]),
                    adapter=random_.choice(["", "", "a", "b", "0x", "1y", "broken"]),
                    score_from=random_.choice([None, None, 0, 5, 16]),
                    search=random_.choice([None, None, None, BeamSearch(2), BeamSearch(3), ContrastiveSearch(3, 0.5)]),
                )
                names.append(name)
            except (PromptTooLong, OutOfMemory):
                pass
        if house.scheduler.requests and random_.random() < 0.1:
            request = random_.choice(list(house.scheduler.requests.values()))
            house.scheduler.end(request)
            house.ended.append(request.id)
        house.step()
    house.run()
    assert sorted([*house.ended, *house.failed]) == sorted(names)
    assert all(isinstance(error, LorryError) for error in house.failed.values())


@pytest.mark.parametrize("prompt", [15, 16, 17, 31, 32, 33])
def test_chunks_cover_the_prompt_once(prompt: int) -> None:
    house = House(token_budget=16)
    request = house.submit("a", prompt, new=1)
    covered = []
    while house.scheduler.requests:
        covered += [(piece.start, piece.end) for piece in house.step().pieces]
    assert covered[0][0] == 0 and covered[-1][1] == prompt
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
    assert all(end - start <= 16 for start, end in covered)
    assert request.sequences[0].output == [1000]


def test_a_long_prompt_does_not_stall_others() -> None:
    house = House(blocks=100, token_budget=64, context_length=1600)
    house.submit("decodes", 5, new=50)
    house.step()
    house.submit("long", 800, new=1)
    for _ in range(2):
        plan = house.step()
        assert [piece.sequence.request.id for piece in plan.pieces] == ["decodes", "long"]
        assert [piece.end - piece.start for piece in plan.pieces] == [1, 63]
    house.submit("short", 20, new=1)
    plan = house.step()
    assert {piece.sequence.request.id: piece.end - piece.start for piece in plan.pieces} == {
        "decodes": 1,
        "long": 43,
        "short": 20,
    }
    assert house.ended == ["short"]


@pytest.mark.parametrize(
    ("remaining", "left", "expected"), [(10, 64, 10), (64, 64, 64), (65, 64, 32), (65, 20, 16), (65, 7, 7), (3, 7, 3)]
)
def test_first_share(remaining: int, left: int, expected: int) -> None:
    assert first_share(remaining, left) == expected


def test_the_youngest_of_the_lowest_priority_is_preempted_and_comes_back() -> None:
    house = House(blocks=8, max_running=4, token_budget=200)
    old = house.submit("old", 31, new=20)
    house.submit("high", 31, new=20, priority=1)
    young = house.submit("young", 15, new=20)
    preempted: list[str] = []
    while house.scheduler.requests:
        house.step()
        preempted += [s.request.id for s in house.scheduler.waiting if s.status is Status.PREEMPTED]
    assert set(preempted) == {"young"}
    assert house.ended == ["high", "old", "young"] or house.ended == ["old", "high", "young"]
    assert young.sequences[0].output == [1000 + i for i in range(20)]
    assert old.sequences[0].preemptions == 0


def test_a_sequence_that_was_preempted_often_ranks_first() -> None:
    house = House(blocks=6)
    low = house.submit("low", 20, new=60, priority=-1)
    low.sequences[0].preemptions = PROTECT_AFTER
    house.submit("high", 20, new=60, priority=5)
    house.run()
    assert low.sequences[0].preemptions == PROTECT_AFTER
    assert house.ended == ["low", "high"]


def test_low_priority_does_not_starve() -> None:
    house = House(max_running=1)
    house.submit("low", priority=-1, new=1)
    for i in range(20):
        house.submit(f"high{i}", priority=1, new=1)
    for i in range(12):
        house.submit(f"more{i}", priority=1, new=1)
        house.step()
    assert "low" in house.ended


def test_one_that_waits_for_its_adapter_blocks_nobody() -> None:
    house = House(slots=1)
    house.submit("first", adapter="a", new=100)
    house.step()
    house.step()
    house.submit("waits", adapter="b", new=1)
    house.submit("base", new=1)
    house.submit("same", adapter="a", new=1)
    house.step()
    assert sorted(house.ended) == ["base", "same"]


@pytest.mark.parametrize("absent", [True, False])
def test_thousands_that_wait_for_their_adapters_delay_nobody(absent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """absent: all wait for adapters that are not there; else for one that is there and lets nobody in for now."""
    house = House(slots=2)
    house.submit("first", adapter="there", new=100)
    house.step()
    house.step()
    ready, asked = house.residency.ready, []
    monkeypatch.setattr(
        house.residency, "ready", lambda lease: asked.append(lease) or (lease.adapter == "there" and ready(lease))
    )
    for number in range(3000):
        house.submit(str(number), adapter=str(number) if absent else "closed")
    for lease in house.residency.leases:
        lease.absent = absent and lease.adapter != "there"
    house.submit("last", adapter="there", new=1)
    house.submit("base", new=1)
    plan = house.step()
    assert sorted(house.ended) == ["base", "last"] and len(plan.pieces) == 3
    assert len(asked) <= MOST_UNREADY + 2, "the time of a plan is bounded"


def test_a_broken_adapter_fails_its_request_only() -> None:
    house = House(broken=frozenset({"bad"}))
    house.submit("bad", adapter="bad")
    house.submit("good", adapter="good")
    house.run()
    assert list(house.failed) == ["bad"] and house.ended == ["good"]


def test_the_prefix_of_an_ended_request_is_found() -> None:
    house = House()
    tokens = list(range(48))
    house.submit("a", tokens, new=20)
    house.run()
    again = house.submit("b", [*tokens, 1000, 1001])
    other = house.submit("c", tokens, adapter="a")
    scored = house.submit("d", tokens, score_from=20)
    exact = house.submit("e", tokens)
    house.run()
    assert again.cached_tokens == 48
    assert other.cached_tokens == 0
    assert scored.cached_tokens == 16
    assert exact.cached_tokens == 32  # the last token of the prompt is always computed


def test_a_fork_shares_the_full_blocks_of_its_prompt() -> None:
    house = House(token_budget=100)
    request = house.submit("a", 39, new=5, n=3)
    house.step()
    tables = [sequence.table.blocks for sequence in request.sequences]
    assert tables[0] == tables[1] == tables[2] and house.allocator.used == 3
    plan = house.step()
    assert len(plan.copies) == 2 and house.allocator.used == 5
    tables = [sequence.table.blocks for sequence in request.sequences]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    house.run()
    assert [len(sequence.output) for sequence in request.sequences] == [5, 6, 7]


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "forked", "preempted"])
def test_end_frees_everything(phase: str) -> None:
    house = House(token_budget=16, blocks=9, max_running=3 if phase != "waiting" else 1)
    if phase == "waiting":
        house.submit("runs", 5, new=2)
        house.step()
    request = house.submit("a", 40, new=30, n=3 if phase in ("forked", "preempted") else 1, adapter="x")
    steps = {"waiting": 0, "prefill": 3, "decode": 6, "forked": 6, "preempted": 6}[phase]
    for _ in range(steps):
        house.step()
    if phase == "preempted":
        while all(s.status is not Status.PREEMPTED for s in request.sequences):
            house.step()
    house.scheduler.end(request)
    house.scheduler.check()
    house.run()


def test_alarms() -> None:
    house = House()
    soft = house.submit("soft", time_limit=5.0)
    hard = house.submit("hard", deadline=3.0)
    house.submit("gone", deadline=1.0)
    house.scheduler.end(house.scheduler.requests["gone"])
    assert house.scheduler.alarms.next == 1.0
    assert house.scheduler.alarms.due(2.9) == []
    assert house.scheduler.alarms.due(5.0) == [(hard, False), (soft, True)]
    assert house.scheduler.alarms.next is None


def test_alarms_of_ended_requests_are_forgotten() -> None:
    house = House()
    for i in range(300):
        house.submit(f"r{i}", new=1, deadline=1e9, time_limit=1e9)
        house.run()
    assert len(house.scheduler.alarms) < 100
    house.submit("r0", deadline=2e9)  # an id may come again: the old alarm is not its own
    assert house.scheduler.alarms.due(1.5e9) == []
    house.run()


@pytest.mark.parametrize("field", ["max_running", "token_budget", "context_length"])
def test_limits_are_positive(field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        Limits(**{"max_running": 1, "token_budget": 1, "context_length": 1} | {field: 0})


@pytest.mark.parametrize(
    ("prompt", "n", "new", "error"),
    [
        (0, 1, 1, InvalidField),
        (100, 1, 1, PromptTooLong),
        (101, 1, 0, PromptTooLong),
        (99, 1, 1, OutOfMemory),
        (10, 7, 1, InvalidField),
    ],
)
def test_what_can_never_run_is_refused(prompt: int, n: int, new: int, error: type[LorryError]) -> None:
    house = House(blocks=6, context_length=100)
    with pytest.raises(error) as caught:
        house.submit("a", prompt, new, n=n)
    if error is PromptTooLong:
        assert caught.value.fields == {"prompt_tokens": str(prompt), "context_length": "100"}
    assert not house.scheduler.requests


def test_a_request_id_in_flight_is_refused() -> None:
    house = House()
    house.submit("a")
    with pytest.raises(AlreadyExists):
        house.submit("a")
    house.run()
    house.submit("a")
    house.run()
