"""Which sequences run in the next step, and who holds the memory: continuous batching over paged blocks.

    waiting ──admit──▶ running ──finish──▶ finished
       ▲                  │
       └────preempt───────┘

Every list is in rank order: protected sequences first, then by priority, then by arrival. A step decodes first, one
token for each running sequence; what is left of the token budget goes to prompts, in chunks, and to sequences that
gained several tokens at once. A decode that finds no block takes those of the sequence with the last rank, which is
recomputed later. Nobody starves: the first in rank is never preempted, a sequence preempted PROTECT_AFTER times ranks
before all others, and every OLDEST_EVERY-th admission goes to the oldest, whatever its priority. A request whose
adapters are not ready is passed over, however many there are; whom `ready` lets in while others wait for room is the
adapters' business.

The sequences of a search are a unit (`units.py`). While one comes back, member by member, nobody else is admitted; so
at most one is partly in, and one that is alone always fits, which `add` has seen to.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from lorry.server.cache.block_table import BlockTable
from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator, blocks_for
from lorry.server.cache.prefix import PrefixIndex
from lorry.server.engine import units
from lorry.server.engine.alarms import Alarms
from lorry.server.engine.plan import Piece, Plan, first_share
from lorry.server.engine.sequence import Lease, Request, Sequence, Status
from lorry.server.errors import AlreadyExists, InvalidField, LorryError, OutOfMemory, PromptTooLong

PROTECT_AFTER = 3
OLDEST_EVERY = 8
MOST_UNREADY = 256  # asked for in one plan, beside one for each set of adapters, which bounds its time


@dataclass(frozen=True, slots=True)
class Limits:
    """max_running in sequences, token_budget in tokens of one step, context_length in tokens of one sequence."""

    max_running: int
    token_budget: int
    context_length: int

    def __post_init__(self) -> None:
        for name in ("max_running", "token_budget", "context_length"):
            if getattr(self, name) < 1:
                raise InvalidField(f"{name} is {getattr(self, name)}, at least 1 is expected", field=name)


class Residency(Protocol):
    """Where a lease's adapters are; all calls return at once."""

    def ready(self, lease: Lease) -> bool:
        """Whether the lease may be pinned now. Raises the LorryError that prevents it for good."""
        ...

    def pin(self, lease: Lease) -> None:
        """Hold the adapters on the device until `unpin`."""
        ...

    def unpin(self, lease: Lease) -> None: ...

    def release(self, lease: Lease) -> None:
        """The request has ended; the lease is void."""
        ...


def _rank(sequence: Sequence) -> tuple[bool, int, int, int]:
    request = sequence.request
    protected = sequence.preemptions >= PROTECT_AFTER
    return not protected, -request.message.priority, request.order, sequence.index


def _remaining(sequence: Sequence) -> int:
    """Tokens to compute before it decodes; the last one of each in a unit of several waits for all of them."""
    return sequence.length - sequence.computed - (len(sequence.unit) > 1)


class Scheduler:
    """Plans steps. Times are time.time(); nothing here waits, and nothing knows tensors."""

    def __init__(self, limits: Limits, allocator: BlockAllocator, index: PrefixIndex, residency: Residency) -> None:
        self.limits = limits
        self.allocator = allocator
        self.index = index
        self.residency = residency
        self.requests: dict[str, Request] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._admitted = 0
        self.alarms = Alarms(self.requests)

    # ---------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request; raises the LorryError of one that can never run."""
        message, prompt = request.message, len(request.prompt)
        limit = self.limits.context_length
        if request.id in self.requests:
            raise AlreadyExists(
                f"request {request.id!r} is in flight", resource_type="request", resource_name=request.id
            )
        if prompt == 0:
            raise InvalidField("the prompt has no tokens", field="prompt")
        if prompt + min(1, message.stopping.max_new_tokens) > limit:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens, prompt and answer together may have {limit}",
                prompt_tokens=prompt,
                context_length=limit,
            )
        if blocks_for(prompt + 1) > self.allocator.num_blocks:
            raise OutOfMemory(
                f"the prompt's {prompt} tokens need more than the {self.allocator.num_blocks} blocks there are"
            )
        if request.rows > self.limits.max_running:
            field = "n" if request.search is None else request.search.rows[0]
            raise InvalidField(
                f"{field} is {request.rows}, at most {self.limits.max_running} sequences run", field=field
            )
        if request.search is not None:
            units.check_fits(request, limit, self.allocator.num_blocks)
        self.requests[request.id] = request
        for index in range(len(request.prompts)):
            sequence = Sequence(request, index, BlockTable(self.allocator))
            request.sequences.append(sequence)
            insort(self.waiting, sequence, key=_rank)
        self.alarms.set(request)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A running sequence that shares all of its running parent's tokens and blocks."""
        child = Sequence(parent.request, index, parent.table.fork())
        child.output = list(parent.output)
        child.logprobs = list(parent.logprobs)
        child.computed, child.registered, child.node = parent.computed, parent.registered, parent.node
        child.drafted = parent.drafted
        child.shown, child.preemptions, child.status = parent.shown, parent.preemptions, Status.RUNNING
        assert parent.unread == 0, "a fork shares tokens that are known"
        parent.request.sequences.append(child)
        insort(self.running, child, key=_rank)
        return child

    def finish(self, sequence: Sequence) -> None:
        """Free everything of a sequence; with the last one of a request, the request."""
        assert sequence.status is not Status.FINISHED
        request = sequence.request
        if sequence.status is Status.RUNNING:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        if request.search is not None:
            request.sequences.remove(sequence)  # a search drops some in each step
        if not request.live:
            del self.requests[request.id]
            self.alarms.tidy()
            if request.lease is not None:
                self.residency.release(request.lease)

    def end(self, request: Request) -> None:
        """Free everything of a request."""
        for sequence in request.live:
            self.finish(sequence)

    # ---------------------------------------------------------------- a step

    def plan(self, now: float, drafts: Mapping[int, tuple[int, ...]] | None = None) -> Plan:
        """Choose the pieces of the next step and take the blocks that they write.

        drafts: by the sequence's key, what to run behind a token that decodes, if there is room
        """
        plan = Plan()
        self._decode(plan)
        if drafts:
            self._draft(plan, drafts)
        self._prefill(plan, now)
        plan.sort()
        return plan

    def launched(self, piece: Piece) -> None:
        """`piece` is being computed: whatever comes next on the device finds it done."""
        piece.sequence.computed = piece.end

    def landed(self, piece: Piece) -> None:
        """The step of `piece` is over and all of its tokens are known; full blocks become findable.

        Since the launch its sequence may have ended, or have lost its blocks and begun again.
        """
        sequence = piece.sequence
        if sequence.status is Status.RUNNING:
            self._register(sequence, min(piece.end, sequence.computed))
            if not piece.draft:  # what a draft model has run behind it, if it has, is void
                sequence.drafted = min(sequence.drafted, piece.end)

    def accepted(self, sequence: Sequence, count: int) -> None:
        """The first `count` tokens of a draft that has been run are the sequence's now; what was computed of the others
        is void."""
        sequence.computed += count
        sequence.drafted = min(sequence.drafted, sequence.computed)
        self._register(sequence, sequence.computed)

    def _register(self, sequence: Sequence, computed: int) -> None:
        while (end := (sequence.registered + 1) * BLOCK_SIZE) <= computed:
            block = sequence.table.blocks[sequence.registered]
            parent = sequence.namespace.before(sequence.registered, sequence.node)
            sequence.node = self.index.insert(parent, sequence.tokens(end - BLOCK_SIZE, end), block)
            sequence.registered += 1

    def _decode(self, plan: Plan) -> None:
        for sequence in list(self.running):
            unit = sequence.unit
            if unit[0] is not sequence or self._over(sequence):
                continue
            if sequence.gained_several:
                self._find_blocks(plan, sequence)
            if not all(each.decides() for each in unit):
                continue
            pieces, copies = len(plan.pieces), len(plan.copies)
            if not all(self._decode_one(plan, each) for each in unit):
                del plan.pieces[pieces:], plan.copies[copies:]

    def _decode_one(self, plan: Plan, sequence: Sequence) -> bool:
        """Plan its next token; False when there was no block for it and it was preempted, with its unit."""
        if not self._find_blocks(plan, sequence):
            return False
        plan.pieces.append(Piece(sequence, sequence.computed, sequence.length))
        return True

    def _find_blocks(self, plan: Plan, sequence: Sequence) -> bool:
        """Blocks for all its tokens, of the last in rank if none are free; False when it is that itself."""
        start, end = sequence.computed, sequence.length
        while (cost := sequence.table.cost(start, end)) > self.allocator.available:
            self._preempt(self.running[-1])  # of no unit that is planned whole: those rank before this one
            if sequence.status is not Status.RUNNING:
                return False
        if cost > 0:
            plan.copies += sequence.table.prepare(start, end)
        return True

    def _draft(self, plan: Plan, drafts: Mapping[int, tuple[int, ...]]) -> None:
        """Lengthen the pieces that decode, with blocks and rows of logits that nobody else needs."""
        left = min(self.limits.token_budget, self.limits.max_running) - len(plan.pieces)
        for place, piece in enumerate(plan.pieces):
            table = piece.sequence.table
            room = min(left, self.limits.context_length - 1 - piece.end)
            draft = drafts.get(piece.sequence.key, ())[: max(0, room)]
            if draft and table.cost(piece.start, piece.end + len(draft)) > self.allocator.available:
                draft = draft[: len(table.blocks) * BLOCK_SIZE - piece.end]
            if draft:
                plan.copies += table.prepare(piece.start, piece.end + len(draft))
                plan.pieces[place] = replace(piece, draft=draft)
                left -= len(draft)

    def _over(self, sequence: Sequence) -> bool:
        """Whether its unread token will be its last, whatever it is."""
        most = sequence.request.message.stopping.max_new_tokens
        return sequence.unread > 0 and (
            len(sequence.output) + sequence.unread >= most or sequence.length >= self.limits.context_length
        )

    def _prefill(self, plan: Plan, now: float) -> None:
        left = max(self.limits.token_budget - sum(piece.stop - piece.start for piece in plan.pieces), BLOCK_SIZE)
        chunks: list[tuple[Sequence, int]] = []
        started = (s for s in list(self.running) if s.length - s.computed > 1)
        for sequence in chain(started, self._admit(plan, now)):
            chunk = first_share(_remaining(sequence), left)
            if chunk == 0:
                continue
            chunks.append((sequence, chunk))
            left -= chunk
            if left == 0:
                break
        for sequence, chunk in chunks:
            more = min(left, _remaining(sequence) - chunk)
            left -= more
            plan.pieces.append(Piece(sequence, sequence.computed, sequence.computed + chunk + more))

    def _admit(self, plan: Plan, now: float) -> Iterator[Sequence]:
        """Make waiting sequences run, one by one as they are asked for."""
        slots = self.limits.max_running - sum(sequence.width for sequence in self.running)
        unready = 0
        refused: set[tuple[str, ...]] = set()
        for sequence in self._in_turn():
            request = sequence.request
            if request.lease is not None and request.lease.absent:
                continue
            if sequence.status in (Status.RUNNING, Status.FINISHED) or sequence.unread:
                continue  # it came as the oldest, its request failed, or it was preempted a moment ago
            if sequence.width > slots or units.comes_back(request):
                break
            if unready >= MOST_UNREADY and request.wants in refused:
                continue
            try:
                ready = request.lease is None or self.residency.ready(request.lease)
            except LorryError as error:
                self.end(request)
                plan.failed.append((request, error))
                continue
            if not ready:
                unready += 1
                refused.add(request.wants)
                continue
            if not self._reserve(sequence):
                break
            slots -= sequence.width
            self._start(sequence, plan, now)
            yield sequence

    def _in_turn(self) -> Iterable[Sequence]:
        """Waiting sequences in the order in which they are tried; while a unit is partly in, only those of it."""
        if rest := [each for each in self.waiting if each.request.search is not None and self._runs(each.request)]:
            return rest
        if self.waiting and self._admitted % OLDEST_EVERY == OLDEST_EVERY - 1:
            oldest = min(self.waiting, key=lambda sequence: sequence.request.order)
            return [oldest, *self.waiting]
        return list(self.waiting)

    def _reserve(self, sequence: Sequence) -> bool:
        """Take blocks for all tokens that are known, the found ones shared; False when they are short."""
        sequence.request.resolve()
        limit = sequence.length - 1  # the last token is always computed, its logits are wanted
        request = sequence.request
        if request.score_from is not None and not sequence.shadowy:
            limit = min(limit, request.score_from - 1)
        if request.observed is not None and request.observed < len(request.prompt):
            limit = min(limit, request.observed)
        match = units.shared(sequence, self.index) or self.index.match(sequence.namespace, sequence.tokens(0, limit))
        self.allocator.share(match.blocks)
        table = BlockTable(self.allocator, match.blocks)
        computed = len(match.blocks) * BLOCK_SIZE
        headroom = len(self.running)  # a block each, so that admission does not preempt at once
        cost = table.cost(computed, sequence.length)
        if request.search is not None:
            headroom -= sum(each.status is Status.RUNNING for each in request.live)
            if not self._runs(request):  # all of the unit must have room
                cost = max(cost, units.blocks_to_come_back(request) - len(match.blocks))
        if cost + headroom > self.allocator.available:
            table.release()
            return False
        table.prepare(computed, sequence.length)
        sequence.table, sequence.computed = table, computed
        sequence.registered, sequence.node = len(match.blocks), match.node
        return True

    def _start(self, sequence: Sequence, plan: Plan, now: float) -> None:
        request = sequence.request
        if request.lease is not None:
            if not self._runs(request):
                self.residency.pin(request.lease)
            request.combo = request.lease.combo
        self._admitted += 1
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)
        if request.scheduled is None:
            request.scheduled = now
            request.cached_tokens = sequence.computed
            plan.started.append(request)

    def _stop(self, sequence: Sequence) -> None:
        request = sequence.request
        self.running.remove(sequence)
        sequence.table.release()
        sequence.status = Status.PREEMPTED
        if request.lease is not None and not self._runs(request):
            self.residency.unpin(request.lease)

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence, and of its unit."""
        unit = sequence.unit
        for each in unit:
            if each.status is Status.RUNNING:
                self._stop(each)
                self.preemptions += 1
            else:
                self.waiting.remove(each)
            each.computed, each.registered, each.node = 0, 0, each.namespace
            each.drafted = 0
            each.preemptions += 1
        for each in unit:
            insort(self.waiting, each, key=_rank)

    @staticmethod
    def _runs(request: Request) -> bool:
        return any(sequence.status is Status.RUNNING for sequence in request.sequences)

    # ---------------------------------------------------------------- proof

    def check(self, under_way: bool = False) -> None:
        """Prove the invariants between two steps. under_way: the last one has not landed yet."""
        live = [sequence for request in self.requests.values() for sequence in request.live]
        assert set(live) == {*self.running, *self.waiting} and len(live) == len(self.running) + len(self.waiting)
        assert self.running == sorted(self.running, key=_rank), "running is out of order"
        assert self.waiting == sorted(self.waiting, key=_rank), "waiting is out of order"
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        assert all(s.status in (Status.WAITING, Status.PREEMPTED) and not s.table.blocks for s in self.waiting)
        assert sum(sequence.width for sequence in self.running) <= self.limits.max_running
        units = [request for request in self.requests.values() if request.search is not None]
        assert all(len(request.live) <= request.rows for request in units), "a search has too many sequences"
        partly = [request for request in units if len({each.status is Status.RUNNING for each in request.live}) > 1]
        assert len(partly) <= 1, "two searches wait for each other's blocks"
        for sequence in self.running:
            assert sequence.computed < sequence.length, "nothing is left to compute"
            assert len(sequence.table.blocks) >= blocks_for(sequence.computed)
            assert under_way or sequence.unread == 0
            full = sequence.computed // BLOCK_SIZE
            assert sequence.registered <= full if under_way else sequence.registered == full
            assert sequence.table.row.tolist() == sequence.table.blocks
        self.allocator.check(sequence.table.blocks for sequence in self.running)
        self.index.check()
