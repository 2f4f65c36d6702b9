"""Best of n over scripted candidates: ranks, indices, what is passed on and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lorry.server.engine.messages import FinishReason, Timings
from lorry.server.frontend.best_of import BestOfHandle
from lorry.server.frontend.request import (
    BestOf,
    Delta,
    Event,
    Finished,
    PromptLogprobs,
    Ranking,
    Request,
    ResponseOptions,
    Started,
    TokenPrompt,
    Usage,
)
from lorry.server.params import SamplingParams, TokenLogprobs


class Scripted:
    """A handle of the candidates; an error in place of an event is raised."""

    request_id = "r"

    def __init__(self, events: Sequence[Event | Exception]) -> None:
        self.events = list(events)
        self.calls: list[str] = []

    def __aiter__(self) -> Scripted:
        return self

    async def __anext__(self) -> Event:
        if not self.events:
            raise StopAsyncIteration
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def abort(self) -> None:
        self.calls.append("abort")

    def close(self) -> None:
        self.calls.append("close")


def delta(index: int, text: str, *logprobs: float) -> Delta:
    entries = tuple(TokenLogprobs(5, value, 1) for value in logprobs)
    return Delta(index, text, (5,) * len(entries), entries)


def finished(index: int, tokens: int, reason: FinishReason = FinishReason.EOS) -> Finished:
    return Finished(index, reason, "", Usage(3, 0, tokens), Timings(0.0, 0.0, index))


STARTED, SCORED = Started("r", 3, 0, ()), PromptLogprobs(())
CANDIDATES = [
    STARTED,
    SCORED,
    delta(2, "long", -1.0, -1.0),
    delta(0, "short", -1.5),
    finished(0, 1, FinishReason.STOP),
    delta(2, "er", -0.1, -1.1),
    finished(1, 0, FinishReason.ABORTED),
    delta(3, "equal", -1.5),
    finished(3, 1),
    finished(2, 4),
]


def handle(events: Sequence[Event | Exception], n: int, ranking: Ranking, logprobs: int | None = None) -> Any:
    request = Request(
        prompt=TokenPrompt((1, 2, 3)),
        sampling=SamplingParams(n=n),
        response=ResponseOptions(logprobs=logprobs),
        best_of=BestOf(4, ranking),
    )
    return BestOfHandle(Scripted(events), request)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranking", "ranks"),
    [(Ranking.MEAN, [(2, -0.8), (0, -1.5), (3, -1.5)]), (Ranking.SUM, [(0, -1.5), (3, -1.5), (2, -3.2)])],
)
@pytest.mark.parametrize("logprobs", [None, 0])
async def test_the_best_are_told_in_their_ranks(
    ranking: Ranking, ranks: list[tuple[int, float]], logprobs: int | None
) -> None:
    for n in (1, 2, 3):
        told = [event async for event in handle(CANDIDATES, n, ranking, logprobs)]
        assert told[:2] == [STARTED, SCORED]
        for rank, (candidate, score) in enumerate(ranks[:n]):
            mine = [event for event in told[2:] if event.index == rank]
            *deltas, end = mine
            theirs = [event for event in CANDIDATES if isinstance(event, Delta) and event.index == candidate]
            assert [event.text for event in deltas] == [event.text for event in theirs]
            assert [event.token_ids for event in deltas] == [event.token_ids for event in theirs]
            wanted = [None] * len(theirs) if logprobs is None else [event.logprobs for event in theirs]
            assert [event.logprobs for event in deltas] == wanted
            assert end.timings.decode == candidate and end.score == pytest.approx(score)
        assert {event.index for event in told[2:]} == set(range(n))


async def test_one_without_tokens_ranks_last() -> None:
    told = [event async for event in handle(CANDIDATES, 4, Ranking.MEAN)]
    assert told[-1].reason is FinishReason.ABORTED and told[-1].score == float("-inf")


async def test_an_error_ends_it_and_ends_are_passed_on() -> None:
    failing = handle([STARTED, delta(0, "a", -1.0), ValueError("gone")], 1, Ranking.MEAN)
    async with failing:
        assert await anext(failing) == STARTED
        with pytest.raises(ValueError, match="gone"):
            await anext(failing)
        failing.abort()
    assert failing.request_id == "r" and failing._inner.calls == ["abort", "close"]
