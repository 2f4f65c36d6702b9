"""Proposals, how many pay, and what becomes of them: the tokens of the same seed, and their distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.server.decoding.grammar import Grammar
from lorry.server.decoding.interface import Row
from lorry.server.decoding.speculation.pace import PROBE, REST, Pace, StepTimes
from lorry.server.decoding.speculation.prompt_lookup import LONGEST, SHORTEST, STRETCH, look_up
from lorry.server.decoding.speculation.strategy import Speculating
from lorry.server.decoding.strategies import Strategies
from lorry.server.params import Speculation, StoppingParams

VOCABULARY = 17


def speculating() -> Speculating:
    return Speculating(Strategies(), Grammar(None, VOCABULARY))


def naive_look_up(tokens: Sequence[int], limit: int) -> list[int]:
    """Every earlier end and every length, as the docstring says it."""
    best, place = 0, -1
    for i in range(len(tokens) - 1):
        m = 0
        while m < min(LONGEST, i + 1) and tokens[i - m] == tokens[len(tokens) - 1 - m]:
            m += 1
        if m >= max(best, 1):
            best, place = m, i
    if best < SHORTEST:
        return []
    period = len(tokens) - 1 - place
    return [tokens[place + 1 + j % period] for j in range(min(limit, STRETCH * best))]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 12))
def test_prompt_lookup(tokens: list[int], limit: int) -> None:
    assert look_up(np.array(tokens, np.int32), limit) == naive_look_up(tokens, limit)


def test_step_times_find_the_line() -> None:
    times = StepTimes()
    assert times.share(1, seconds=9.0) == pytest.approx(0.05 / 1.05)
    for tokens in (1, 5, 9, 3) * 5:
        times.saw(tokens, 0.010 + 0.001 * tokens)
    assert times.share(1) == pytest.approx(1 / 11)
    assert times.share(10) == pytest.approx(1 / 2)
    assert times.share(10, seconds=0.005) == pytest.approx(3 / 4)


def test_a_length_pays_while_the_last_token_does() -> None:
    pace = Pace()
    for _ in range(50):
        pace.saw(0, 0, 4, 3)
    rate = pace.acceptance(0)
    assert rate == pytest.approx(0.75, abs=0.01)
    for share in (0.01, 0.1, 0.3, 0.7):
        length = pace.length(0, 0, share, 32)
        assert rate**length >= share > rate ** (length + 1)
    assert pace.length(0, 0, 0.1, 2) == 2
    assert pace.length(0, 0, 0.0, 32) == 32


def test_a_row_for_which_nothing_pays_rests_longer_and_longer_and_comes_back() -> None:
    pace = Pace()
    for _ in range(50):
        pace.saw(0, 0, 4, 0)
    assert pace.length(0, 0, 0.2, 8) == 0
    assert pace.rests(0, REST - 1) and not pace.rests(0, REST)
    assert pace.length(0, REST - 1, 0.2, 8) == 0
    assert pace.length(0, REST, 0.2, 8) == PROBE
    pace.saw(0, REST, PROBE, 0)
    assert pace.length(0, 3 * REST - 1, 0.2, 8) == 0
    place = 3 * REST
    for _ in range(50):
        assert pace.length(0, place, 0.2, 8) > 0
        pace.saw(0, place, 3, 3)
    assert pace.length(0, place, 0.2, 8) == 8


def test_a_row_rests_again_where_even_what_is_right_does_not_pay() -> None:
    """A draft model as slow as the model."""
    pace = Pace()
    assert pace.length(0, 0, 1.2, 8) == 0
    assert pace.length(0, REST, 1.2, 8) == PROBE
    pace.saw(0, REST, PROBE, PROBE)
    assert pace.rests(0, 3 * REST - 1) and not pace.rests(0, 3 * REST)
    assert pace.length(0, 3 * REST, 0.1, 8) == 8


def drafted(row: Row, draft: Sequence[int]) -> Row:
    return replace(row, draft_token_ids=tuple(draft))


@pytest.mark.parametrize(
    "asked", [{}, {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}, {"top_p": 0.8, "dry": None}]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_and_logprobs_are_those_of_one_step_after_the_other(
    make_row: Any, temperature: float, asked: dict[str, Any]
) -> None:
    """Whatever was proposed, beside rows without a draft."""
    torch.manual_seed(1)
    steps = torch.randn(6, VOCABULARY) * 2
    given = {"temperature": temperature, "speculation": Speculation("prompt_lookup"), "logprobs": 2, **asked}
    rows = [make_row(key=key, seed=key, output=[3, 1, 3], **given) for key in range(40)]
    expected, logprobs = [], []
    for row in rows:
        plain, output = Strategies(), list(row.output_token_ids)
        found = []
        for step in steps:
            (way,) = plain.decide([replace(row, output_token_ids=output)], step[None].clone())
            output += way.token_ids
            found += way.logprobs or ()
        expected.append(output[3:])
        logprobs.append(found)
    drafts = [[*tokens[: key % 6], 0, 1, 2][: key % 5] for key, tokens in enumerate(expected)]
    logits = torch.cat([steps[: 1 + len(draft)] for draft in drafts])
    ways = speculating().decide([drafted(row, draft) for row, draft in zip(rows, drafts, strict=True)], logits)
    assert [way.parent for way in ways] == list(range(len(rows)))
    for way, tokens, found, draft in zip(ways, expected, logprobs, drafts, strict=True):
        right = next((i for i, (a, b) in enumerate(zip(draft, tokens, strict=False)) if a != b), len(draft))
        assert list(way.token_ids) == tokens[: right + 1]
        assert list(way.logprobs or ()) == found[: right + 1]
        assert way.accepted == (right if draft else None)


@pytest.mark.parametrize("proposer", ["prompt_lookup", "draft_model"])
def test_the_distribution_is_that_of_plain_sampling(make_row: Any, proposer: str) -> None:
    """Chi-square of 20,000 draws, of the first token and of the second where the first was foretold."""
    rows, torch_seed = 20_000, 5
    torch.manual_seed(torch_seed)
    first, second, others = torch.randn(3, VOCABULARY) * 1.5
    asked = {"temperature": 1.0, "top_p": 0.9, "speculation": Speculation(proposer)}
    batch = [make_row(key=key, seed=key * 7919 + 1, **asked) for key in range(rows)]
    strategy = speculating()
    if proposer == "draft_model":
        proposed = strategy.propose(batch, [()] * rows, (first + others)[None].repeat(rows, 1))
    else:
        proposed = [4] * rows
    logits = torch.stack((first, second)).repeat(rows, 1)
    ways = strategy.decide([drafted(row, [token or 0]) for row, token in zip(batch, proposed, strict=True)], logits)
    firsts = Counter(way.token_ids[0] for way in ways)
    seconds = Counter(way.token_ids[1] for way in ways if way.accepted)
    assert sum(way.accepted or 0 for way in ways) > rows / 50
    assert chi_square(firsts, first, 0.9) < 1
    assert chi_square(seconds, second, 0.9) < 1


def chi_square(counts: Counter[int], logits: torch.Tensor, top_p: float) -> float:
    """Over the bound that one draw in 10⁴ passes, by Wilson and Hilferty's approximation."""
    p, order = logits.double().softmax(0).sort(descending=True)
    kept = p.cumsum(0) - p < top_p
    p, ids, total = p[kept] / p[kept].sum(), order[kept].tolist(), counts.total()
    assert set(counts) <= set(ids)
    found = sum((counts[token] - total * float(q)) ** 2 / (total * float(q)) for token, q in zip(ids, p, strict=True))
    freedom = len(ids) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return found / bound


def test_a_draft_model_of_the_same_mind_is_always_right(make_row: Any) -> None:
    torch.manual_seed(2)
    logits = torch.randn(200, VOCABULARY) * 2
    asked = {"temperature": 1.0, "typical_p": 0.9, "speculation": Speculation("draft_model")}
    rows = [make_row(key=key, seed=key, **asked) for key in range(200)]
    strategy = speculating()
    proposed = strategy.propose(rows, [()] * 200, logits.clone())
    both = logits.repeat_interleave(2, 0)
    ways = strategy.decide([drafted(row, [t or 0]) for row, t in zip(rows, proposed, strict=True)], both)
    assert all(way.accepted == 1 for way in ways)


def test_what_ends_a_row_is_not_proposed(make_row: Any) -> None:
    wanted, text = Speculation("prompt_lookup"), [5, 6, 7, 8, 9, 5, 6]
    strategy = speculating()
    assert strategy.look_up(make_row(prompt=text, speculation=wanted), 3) == [7, 8, 9]
    assert strategy.look_up(make_row(key=1, prompt=text, eos=(9,), speculation=wanted), 3) == [7, 8]
    stopping = StoppingParams(9, stop_token_ids=(7,))
    assert strategy.look_up(make_row(key=2, prompt=text, stopping=stopping, speculation=wanted), 3) == []
    likely = torch.zeros(1, VOCABULARY)
    likely[0, 9] = 50
    ending = make_row(key=3, eos=(9,), temperature=0.0, speculation=Speculation("draft_model"))
    assert strategy.propose([ending], [[4]], likely) == [None]


def test_no_more_is_proposed_than_may_be_put_out(make_row: Any) -> None:
    strategy = speculating()
    row = make_row(output=[1] * 5, stopping=StoppingParams(8), speculation=Speculation("prompt_lookup", adaptive=False))
    assert strategy.room(row, 0.0, 32) == 2
    assert strategy.room(row, 0.0, 1) == 1
    assert (
        strategy.room(
            make_row(output=[1] * 7, stopping=StoppingParams(8), speculation=Speculation("prompt_lookup")), 0, 9
        )
        == 0
    )


def test_state_is_forgotten(make_row: Any) -> None:
    strategy = speculating()
    row = make_row(prompt=[1, 2, 1, 2], output=[1], repetition_penalty=1.3, speculation=Speculation("prompt_lookup"))
    assert strategy.look_up(row, 2) == [2, 1]
    strategy.decide([drafted(row, [2, 1])], torch.randn(3, VOCABULARY))
    strategy.release(row.key)
    holders: list[Any] = [strategy.pace._rows, strategy._histories._tokens, strategy.inner.processors._needs]  # type: ignore[attr-defined]
    assert not any(holders)
