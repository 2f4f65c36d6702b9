"""What the engine knows of a request and of each of its sequences: plain data, changed by the scheduler."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Protocol

from lorry.adapters.activation import activation
from lorry.server.cache.block_table import BlockTable
from lorry.server.cache.prefix import Namespace, Node
from lorry.server.engine.messages import AdapterRef, Generate, Timings, TokenLogprobs
from lorry.server.params import Guidance

if TYPE_CHECKING:
    from lorry.server.decoding.interface import Row
    from lorry.server.grammars.compiling import Compiled

Combo = tuple[tuple[int, float], ...]  # (slot of a resident adapter, weight) each, in the request's order

_keys = itertools.count()


class Lease(Protocol):
    """A request's hold on its adapters."""

    @property
    def revisions(self) -> tuple[str, ...]:
        """Of each adapter in the request's order; known when the lease is ready, fixed once it was pinned."""
        ...

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """Of a lease on one activated LoRA, else (); known and fixed as the revisions are."""
        ...

    @property
    def combo(self) -> Combo:
        """Valid while the lease is pinned."""
        ...

    @property
    def absent(self) -> bool:
        """Whether adapters are on their way, so that the lease cannot be ready."""
        ...


class Status(enum.Enum):
    WAITING = "waiting"  # has never run
    RUNNING = "running"  # holds blocks, its adapters are pinned
    PREEMPTED = "preempted"  # its blocks were taken away; waits to be recomputed
    FINISHED = "finished"


class Request:
    """One `Generate` on its way through the engine.

    order: number of the request in this engine, by arrival
    lease: None for the base
    grammar: of its structured output, held so that it stays compiled
    adapters, namespace: of what the request runs on, with revisions; void before `resolve`. The namespace has no
        adapters where they are not invoked
    guidance: None, or what its second sequence runs on, its shadow; shadow: the namespace of that
    wants: ids of its adapters
    combo: of its adapters; valid while a sequence runs
    pending: indices of sequences that are not born yet; the first sequence carries the prompt for all of them. Of a
        search: indices that have no answer yet
    search: None, or what decides all of its sequences together: they run, wait and are preempted as one
    observed: tokens of the prompt whose hidden states the strategy has seen; None: it wants none
    """

    def __init__(
        self, message: Generate, order: int, lease: Lease | None = None, grammar: Compiled | None = None
    ) -> None:
        self.id = message.request_id
        self.message = message
        self.prompt = message.prompt_token_ids
        self.order = order
        self.lease = lease
        self.grammar = grammar
        self.wants = tuple(ref.id for ref in message.adapters)
        self.adapters: tuple[AdapterRef, ...] = ()
        self.namespace = self.shadow = Namespace()
        self.combo: Combo = ()
        self.pending = list(range(message.sampling.n))
        self.search = message.sampling.search
        self.dola = message.sampling.dola
        self.guidance = self.search if isinstance(self.search, Guidance) else None
        self.observed = 0 if self.search is not None and self.search.observes else None
        self.sequences: list[Sequence] = []
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.scheduled: float | None = None  # time.time() of the first step
        self.prefilled: float | None = None  # time.time() of the first token

    def resolve(self) -> None:
        """Read the revisions of a lease that is ready, and find where in the prompt its adapters begin to act."""
        revisions = () if self.lease is None else self.lease.revisions
        adapters = tuple(
            AdapterRef(ref.id, ref.weight, revision)
            for ref, revision in zip(self.message.adapters, revisions, strict=True)
        )
        if adapters and adapters == self.adapters:
            return
        self.adapters = adapters
        self.namespace = self._namespace(self.prompt[: self.message.prompt_end])
        if self.guidance is not None:
            bare = Namespace(cache_salt=self.message.cache_salt)
            negative = self.guidance.negative
            self.shadow = bare if negative is None else self._namespace(list(negative))

    def _namespace(self, prompt: list[int]) -> Namespace:
        start: int | None = 0
        if self.lease is not None and (invocation_tokens := self.lease.invocation_tokens):
            start = activation(prompt, invocation_tokens)
        keys = tuple((ref.id, ref.revision or "", ref.weight) for ref in self.adapters)
        salt = self.message.cache_salt
        return Namespace(cache_salt=salt) if start is None else Namespace(keys, salt, start)

    @property
    def prompts(self) -> list[list[int]]:
        """Of its sequences: the request's, and behind it the shadow's, if it has one."""
        if self.guidance is None:
            return [self.prompt]
        negative = self.guidance.negative
        return [self.prompt, self.prompt if negative is None else list(negative)]

    @property
    def score_from(self) -> int | None:
        """First prompt token whose log-probability is wanted and not known yet; token 0 has none."""
        first = self.message.prompt_logprobs_from
        return None if first is None else max(first, 1) + len(self.prompt_logprobs)

    @property
    def rows(self) -> int:
        """The most sequences that it runs at once."""
        return self.message.sampling.n if self.search is None else self.search.rows[1]

    @property
    def live(self) -> list[Sequence]:
        """Sequences that have not finished."""
        return [sequence for sequence in self.sequences if sequence.status is not Status.FINISHED]

    def timings(self, now: float) -> Timings:
        """Seconds in the queue, in prefill and in decoding until `now`."""
        scheduled = now if self.scheduled is None else self.scheduled
        prefilled = now if self.prefilled is None else self.prefilled
        return Timings(max(0.0, scheduled - self.message.arrival), prefilled - scheduled, now - prefilled)


class Sequence:
    """One stream of tokens: the request's prompt and an output that grows.

    prompt: the request's, or that of its shadow
    computed: tokens whose keys and values are in `table`'s blocks. A sequence that decodes has all but one computed
    drafted: tokens whose keys and values of the draft model are there
    registered, node: full blocks that the prefix index knows of this sequence, and the node after the last of them
    shown: tokens of the output that were sent; held ones come later
    unread: tokens behind the output that the device has chosen and the engine has not read yet: 0, 1, or, between the
        launch of a step and the commit of the one before, 2
    place: row of the last of them among the tokens of its step
    """

    __slots__ = (
        "computed",
        "drafted",
        "index",
        "key",
        "logprobs",
        "node",
        "output",
        "place",
        "preemptions",
        "prompt",
        "registered",
        "request",
        "row",
        "shown",
        "status",
        "table",
        "unread",
    )

    def __init__(self, request: Request, index: int, table: BlockTable) -> None:
        self.key = next(_keys)
        self.request = request
        self.index = index
        self.prompt = request.prompts[index] if request.guidance is not None else request.prompt
        self.table = table
        self.output: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.computed = 0
        self.drafted = 0
        self.registered = 0
        self.node: Node = self.namespace
        self.status = Status.WAITING
        self.preemptions = 0
        self.shown = 0
        self.unread = 0
        self.place = 0
        self.row: Row | None = None

    @property
    def shadowy(self) -> bool:
        """Whether it only guides another sequence, and is no part of the answer."""
        return self.request.guidance is not None and self.index == 1

    @property
    def namespace(self) -> Namespace:
        return self.request.shadow if self.shadowy else self.request.namespace

    @property
    def combo(self) -> Combo:
        """What its tokens from `namespace.start` on use, the base before; valid while it runs."""
        return self.request.combo if self.namespace.adapters else ()

    @property
    def length(self) -> int:
        """Tokens of prompt and output, unread ones included."""
        return len(self.prompt) + len(self.output) + self.unread

    @property
    def width(self) -> int:
        """Rows that this sequence takes or, while it carries the prompt for others, will take; the first sequence of a
        search takes all that the search may need."""
        request = self.request
        if request.search is None:
            return max(1, len(request.pending))
        return request.rows if request.sequences[0] is self else 0

    @property
    def unit(self) -> SequenceOf[Sequence]:
        """Those that go on in the same steps as this one, itself included."""
        return (self,) if self.request.search is None else self.request.live

    @property
    def answer(self) -> int:
        """The index under which its tokens are told."""
        return self.index if self.request.search is None else 0

    @property
    def gained_several(self) -> bool:
        """Whether it runs and gained several tokens at once, whose blocks may be lacking; a prompt has its blocks."""
        return self.status is Status.RUNNING and bool(self.output) and self.length - self.computed > 1

    def decides(self) -> bool:
        """Whether it runs and one token is left to be computed."""
        return self.status is Status.RUNNING and self.length - self.computed == 1

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions [start, end), prompt first, then output, without unread ones."""
        prompt = self.prompt
        split = len(prompt)
        if start >= split:
            return self.output[start - split : end - split]
        return prompt[start:end] if end <= split else prompt[start:] + self.output[: end - split]
