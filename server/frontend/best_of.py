"""Best of n: of the sequences that a request samples its reader sees the most likely ones.

    score = mean or sum over the sequence's tokens of log p(token | all before it)

p is the model's own, as in `lorry.server.decoding.logprobs`. The candidates are sequences like any others, up to here:
stop strings end them, and a GPU draws their tokens ahead. A candidate without a token ranks last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Self

from lorry.server.frontend.interface import RequestHandle
from lorry.server.frontend.request import BestOf, Delta, Event, Finished, Ranking, Request


@dataclass(slots=True)
class _Candidate:
    deltas: list[Delta] = field(default_factory=list)
    finished: Finished | None = None

    def score(self, ranking: Ranking) -> float:
        found = [entry.logprob for delta in self.deltas for entry in delta.logprobs or ()]
        if not found:
            return float("-inf")
        return sum(found) / (len(found) if ranking is Ranking.MEAN else 1)


class BestOfHandle:
    """A `RequestHandle` over the one that reads all candidates; until the last of these has ended it is silent."""

    def __init__(self, candidates: RequestHandle, request: Request) -> None:
        assert request.best_of is not None
        self._inner = candidates
        self._best_of: BestOf = request.best_of
        self._n = request.sampling.n
        self._with_logprobs = request.response.logprobs is not None
        self._candidates: dict[int, _Candidate] = {}
        self._ready: deque[Event] | None = None

    @property
    def request_id(self) -> str:
        return self._inner.request_id

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while self._ready is None:
            try:
                event = await anext(self._inner)
            except StopAsyncIteration:
                self._ready = deque(self._best())
                break
            match event:
                case Delta():
                    self._candidates.setdefault(event.index, _Candidate()).deltas.append(event)
                case Finished():
                    self._candidates.setdefault(event.index, _Candidate()).finished = event
                case _:
                    return event
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def _best(self) -> list[Event]:
        """The events of the best candidates, whose indices become their ranks."""
        ended = [each for _, each in sorted(self._candidates.items()) if each.finished is not None]
        scored = sorted(((each.score(self._best_of.ranking), each) for each in ended), key=lambda pair: -pair[0])
        events: list[Event] = []
        for rank, (score, each) in enumerate(scored[: self._n]):
            deltas = each.deltas if self._with_logprobs else [replace(delta, logprobs=None) for delta in each.deltas]
            events += [replace(delta, index=rank) for delta in deltas]
            assert each.finished is not None
            events.append(replace(each.finished, index=rank, score=score))
        return events
