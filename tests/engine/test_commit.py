"""Commit beyond one token a row: forks, held and final continuations, and faults that stay with their request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.server.decoding.interface import Continuation, Row
from lorry.server.decoding.sampling import Sampling
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.loop import MAX_FAULTS
from lorry.server.engine.messages import Failed, FinishReason, Tokens
from lorry.server.errors import OutOfMemory


class Scripted(Sampling):
    """Sampling, but what `script` returns for a row, if it is not None, goes in place of that row's token."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script
        self.forks: list[tuple[int, int]] = []
        self.released: list[int] = []

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        continuations: list[Continuation] = []
        for place, (row, sampled) in enumerate(zip(rows, super().decide(rows, logits), strict=True)):
            scripted = self.script(row)
            ways = [((sampled.token_ids), {})] if scripted is None else scripted
            continuations += [Continuation(place, tokens, **rest) for tokens, rest in ways]
        return continuations

    def forked(self, parent: int, child: int) -> None:
        self.forks.append((parent, child))

    def release(self, key: int) -> None:
        self.released.append(key)
        super().release(key)


def scripted(engine: LocalEngine, script: Any) -> Scripted:
    strategy = Scripted(script)
    engine.engine.committer.strategy = strategy
    return strategy


def test_a_parent_with_two_ways_is_forked_and_one_without_is_dropped(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()

    def script(row: Row) -> list[Any] | None:
        output = list(row.output_token_ids)
        if output == []:
            return [((50,), {})]
        if output == [50]:
            return [((60,), {}), ((61,), {}), ((62,), {})]
        if output == [50, 61]:
            return []
        return None

    strategy = scripted(engine, script)
    answer = engine.generate(generate("beams", list(range(2, 22)), 5))[0]
    assert answer.tokens(0)[:2] == [50, 60] and len(answer.tokens(0)) == 5
    assert answer.tokens(1) == [61] and answer.completions[1].finish is None
    assert answer.tokens(2)[0] == 62 and len(answer.tokens(2)) == 4
    assert len(strategy.forks) == 2 and len(set(strategy.released)) == 3
    for first in (60, 62):  # a fork goes on as if its tokens had been the prompt
        solo = build().generate(generate("solo", [*range(2, 22), 50, first], 3))[0]
        assert answer.tokens(first - 60)[-3:] == solo.tokens()


def test_held_tokens_are_shown_later_and_final_replaces_them(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    ways = {
        0: ((40,), {}),
        1: ((41,), {"held": 1}),
        2: ((42,), {"held": 2}),
        3: ((43,), {"held": 1}),
        4: ((70, 71), {"final": True, "score": -1.5}),
    }
    scripted(engine, lambda row: [ways[len(row.output_token_ids)]])
    engine.generate(generate("held", [5, 6, 7], 9))
    sent = [m.token_ids for m in engine.messages if isinstance(m, Tokens)]
    assert sent == [[40], [41, 42], [70, 71]]
    assert engine.answers["held"].completions[0].finish is FinishReason.LENGTH


def test_a_row_that_cannot_be_decided_fails_alone(build: Any, generate: Any) -> None:
    def script(row: Row) -> None:
        if row.prompt_token_ids[0] == 66 and len(row.output_token_ids) == 2:
            raise ZeroDivisionError

    engine: LocalEngine = build()
    requests = [generate(str(i), [66 if i == 1 else i + 3, 9, 10], 6, n=1 + (i == 1)) for i in range(3)]
    expected = build().generate(*requests)
    scripted(engine, script)
    answers = engine.generate(*requests)
    assert [answers[i].tokens() for i in (0, 2)] == [expected[i].tokens() for i in (0, 2)]
    assert answers[1].error is not None and "internal error" in answers[1].error.message
    assert "ZeroDivision" not in answers[1].error.message
    assert sum(isinstance(message, Failed) for message in engine.messages) == 1


def test_a_piece_that_cannot_be_run_fails_alone(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    runner = engine.engine.runner
    forward = runner.forward

    def failing(batch: Any) -> Any:
        if any(piece.sequence.request.id == "bad" and piece.start > 3 for piece in batch.pieces):
            raise ZeroDivisionError
        return forward(batch)

    runner.forward = failing  # type: ignore[method-assign]
    requests = [generate(name, [i + 3, 9, 10], 6, n=2) for i, name in enumerate(("good", "bad", "fine"))]
    answers = engine.generate(*requests)
    expected = build().generate(*requests)
    for good in (0, 2):
        assert [answers[good].tokens(i) for i in (0, 1)] == [expected[good].tokens(i) for i in (0, 1)]
    assert answers[1].error is not None
    assert sum(isinstance(message, Failed) for message in engine.messages) == 1


def test_an_engine_that_cannot_run_anything_gives_up(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()

    def failing(batch: Any) -> Any:
        raise ZeroDivisionError

    engine.engine.runner.forward = failing  # type: ignore[method-assign]
    for number in range(MAX_FAULTS - 1):
        assert engine.generate(generate(str(number), [4, 5]))[0].error is not None
    engine.send(generate("last", [4, 5]))
    with pytest.raises(RuntimeError, match="failed whole"):
        engine.step()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("room", [0, 17, 40])
def test_short_memory_cuts_a_prompt_or_ends_its_request_alone(
    build: Any, generate: Any, room: int, ahead: bool
) -> None:
    requests = [generate("long", list(range(3, 98)), 4), generate("short", [4, 9], 12)]
    expected = build().generate(*requests)
    engine: LocalEngine = build(ahead=ahead)
    runner = engine.engine.runner
    forward = runner.forward

    def short(batch: Any) -> Any:
        if any(piece.sequence.request.id == "long" and piece.end - piece.start > room for piece in batch.pieces):
            raise torch.OutOfMemoryError
        return forward(batch)

    runner.forward = short  # type: ignore[method-assign]
    long, other = engine.generate(*requests)
    assert other.tokens() == expected[1].tokens()
    if room:
        assert long.tokens() == expected[0].tokens()
    else:
        assert isinstance(long.error, OutOfMemory) and "no memory left for this request" in long.error.message


def test_a_lost_device_ends_the_engine(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    forward = engine.engine.runner.forward

    def lost(batch: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine.engine.runner.forward = lost  # type: ignore[method-assign]
    engine.send(generate("any", [4, 5]))
    with pytest.raises(torch.AcceleratorError):
        engine.step()
    engine.engine.runner.forward = forward  # type: ignore[method-assign]
    engine.run()
