"""Processors against transformers' classes, and against OpenAI's formula where transformers has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from lorry.server.decoding.interface import Row
from lorry.server.decoding.processors import Processors
from lorry.server.params import Dry, StoppingParams

VOCABULARY = 53
few = st.integers(0, 4) | st.integers(0, VOCABULARY - 1)  # so that texts repeat themselves
words = st.lists(few, min_size=1, max_size=4).map(tuple)
tokens = st.lists(st.integers(0, 4), max_size=31) | st.lists(few, max_size=31)
penalty = st.sampled_from([0.0, -1.5, 0.3, 2.0])


def expected(row: Row, logits: torch.Tensor) -> torch.Tensor:
    """One row's logits through the oracles, float32 [V]."""
    s = row.sampling
    ids = torch.tensor([[*row.prompt_token_ids, *row.output_token_ids]])
    scores = logits[None].clone()
    if s.logit_bias:
        scores = SequenceBiasLogitsProcessor({(t,): b for t, b in s.logit_bias.items()})(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
    for token, count in Counter(row.output_token_ids).items():
        scores[0, token] -= s.presence_penalty + s.frequency_penalty * count
    if s.dry is not None:
        for token, penalty in dry_reference(ids[0].tolist(), s.dry).items():
            scores[0, token] -= penalty
    if s.no_repeat_ngram_size:
        scores = NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size)(ids, scores)
    if s.bad_words:
        scores = NoBadWordsLogitsProcessor([list(word) for word in s.bad_words])(ids, scores)
    ending = [*row.stopping.stop_token_ids, *(() if row.stopping.ignore_eos else row.eos_token_ids)]
    if ending:
        prompt_length = len(row.prompt_token_ids)
        minimum = row.stopping.min_new_tokens
        scores = MinNewTokensLengthLogitsProcessor(prompt_length, minimum, ending)(ids, scores)
    if s.allowed_token_ids:
        scores = PrefixConstrainedLogitsProcessor(lambda *_: list(s.allowed_token_ids), 1)(ids, scores)
    return scores[0] if scores[0].max() > -torch.inf else torch.zeros(VOCABULARY)


def dry_reference(tokens: list[int], dry: Dry) -> dict[int, float]:
    """The definition read aloud: every earlier place, and how far back from it the text is what it is at its end."""
    tokens = tokens[-dry.range :] if dry.range else tokens
    longest: dict[int, int] = {}
    for place in range(1, len(tokens)):
        run = 0
        while run < min(place, 50) and tokens[place - 1 - run] == tokens[-1 - run]:
            if tokens[-1 - run] in dry.sequence_breakers:
                break
            run += 1
        if run and tokens[place] not in dry.sequence_breakers:
            longest[tokens[place]] = max(run, longest.get(tokens[place], 0))
    least = dry.allowed_length
    return {token: dry.multiplier * dry.base ** (n - least) for token, n in longest.items() if n >= least}


@st.composite
def row_arguments(draw: st.DrawFn) -> dict[str, object]:
    return {
        "prompt": draw(st.lists(few, min_size=1, max_size=31)),
        "output": draw(tokens),
        "eos": draw(st.sampled_from([(), (7,), (7, 50)])),
        "stopping": StoppingParams(
            max_new_tokens=99,
            min_new_tokens=draw(st.integers(0, 33)),
            stop_token_ids=draw(st.sampled_from([(), (0,), (52, 11)])),
            ignore_eos=draw(st.booleans()),
        ),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.7])),
        "presence_penalty": draw(penalty),
        "frequency_penalty": draw(penalty),
        "logit_bias": draw(
            st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.25, 3.5]), max_size=5)
        ),
        "dry": draw(
            st.none()
            | st.builds(
                Dry,
                st.sampled_from([0.8, 2.0]),
                base=st.sampled_from([1.0, 1.75]),
                allowed_length=st.integers(1, 3),
                sequence_breakers=st.sampled_from([(), (3,), (0, 2)]),
                range=st.sampled_from([0, 1, 9, 999]),
            )
        ),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 0, 1, 2, 3, 7])),
        "bad_words": draw(
            st.lists(st.lists(few, min_size=1, max_size=4).map(tuple), max_size=5, unique=True).map(tuple)
        ),
        "allowed_token_ids": draw(st.just(()) | st.lists(few, min_size=1, max_size=9, unique=True).map(tuple)),
    }


@settings(deadline=None, max_examples=120, derandomize=True)
@given(arguments=st.lists(row_arguments(), min_size=1, max_size=7), seed=st.integers(0, 999))
def test_a_mixed_batch_equals_the_oracles_row_by_row(
    make_row: Callable[..., Row], arguments: list[dict[str, object]], seed: int
) -> None:
    rows = [make_row(key=i, **a) for i, a in enumerate(arguments)]
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = torch.stack([expected(row, z) for row, z in zip(rows, logits, strict=True)])
    got = logits.clone()
    Processors().apply(rows, got)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    plain = [i for i, row in enumerate(rows) if not Processors().needs(row)]
    assert torch.equal(got[plain], logits[plain])


def test_counts_follow_the_output_as_it_grows_and_survive_forks_and_preemption(make_row: Callable[..., Row]) -> None:
    options = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.9,
        "dry": Dry(0.7, allowed_length=1, sequence_breakers=(31,)),
        "no_repeat_ngram_size": 3,
        "bad_words": ((5, 31), (8,), (9, 3, 5)),
    }
    prompt, output = [3, 9, 3], list[int]()
    row = make_row(key=1, prompt=prompt, output=output, **options)
    processors = Processors()
    generator = torch.Generator().manual_seed(3)
    for token in [5, 9, 5, 5, 31, 52, 9, 3, *range(20, 45), *range(20, 45), 9, 3, 9, 3, *range(4, 45)]:
        logits = torch.randn(1, VOCABULARY, generator=generator)
        got = logits.clone()
        processors.apply([row], got)
        torch.testing.assert_close(got[0], expected(row, logits[0]), rtol=1e-6, atol=1e-6)
        output.append(token)
    fork = make_row(key=2, prompt=prompt, output=[*output, 17], **options)
    output.append(18)
    logits = torch.randn(1, VOCABULARY, generator=generator).repeat(2, 1)
    got, afresh = logits.clone(), logits.clone()
    processors.apply([row, fork], got)
    Processors().apply([row, fork], afresh)
    assert torch.equal(got, afresh)
    assert not torch.equal(got[0], got[1])
    processors.release(1)
    processors.release(1)
    again = logits.clone()
    processors.apply([row, fork], again)
    assert torch.equal(again, afresh)


def test_a_token_outside_the_vocabulary_never_reaches_another_row(make_row: Callable[..., Row]) -> None:
    rows = [make_row(key=0, prompt=[1, VOCABULARY], repetition_penalty=1.5), make_row(key=1)]
    with pytest.raises(IndexError, match="vocabulary of 53"):
        Processors().apply(rows, torch.ones(2, VOCABULARY))
    short = StoppingParams(max_new_tokens=9, min_new_tokens=2, stop_token_ids=(VOCABULARY + 1,))
    logits = torch.ones(2, VOCABULARY)
    Processors().apply([make_row(key=0, stopping=short), make_row(key=1)], logits)
    assert torch.equal(logits, torch.ones(2, VOCABULARY))
