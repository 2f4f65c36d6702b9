"""Contrastive search in the engine against a plain reference, written from the paper: each candidate run anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import Abort, FinishReason, Started, Tokens
from lorry.server.params import ContrastiveSearch


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(2, 131), k=length)


def reference(
    model: LlamaForCausalLM,
    tokens: list[int],
    new: int,
    search: ContrastiveSearch,
    eos: tuple[int, ...] = (),
    bias: dict[int, float] | None = None,
) -> list[int]:
    """Su et al. 2022, equation 5; whole texts, each run anew."""
    alpha, text = search.penalty_alpha, list(tokens)
    while len(text) - len(tokens) < new and not (len(text) > len(tokens) and text[-1] in eos):
        with torch.no_grad():
            base = model.model(torch.tensor([text])).last_hidden_state[0]
            logits = model.lm_head(base[-1])
            for token_id, value in (bias or {}).items():
                logits[token_id] += value
            p = logits.softmax(-1)
            best = p.topk(search.top_k).indices.tolist()
            behind = model.model(torch.tensor([[*text, v] for v in best])).last_hidden_state[:, -1]
        similar = torch.cosine_similarity(behind[:, None], base[None], dim=-1).amax(dim=1)
        scores = (1 - alpha) * p[best] - alpha * similar
        text.append(best[int(scores.argmax())])
    return text[len(tokens) :]


def shared(build: Any) -> LocalEngine:
    """One engine for all examples of a test."""
    if not hasattr(build, "engine"):
        build.engine = build(max_running=32, token_budget=21)
    engine: LocalEngine = build.engine
    return engine


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_are_those_of_the_paper(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, data: st.DataObject
) -> None:
    draw = data.draw
    search = ContrastiveSearch(draw(st.integers(2, 9)), draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])))
    new = draw(st.integers(1, 12))
    eos = tuple(draw(st.sets(st.integers(1, 130), max_size=2)))
    bias = dict.fromkeys(eos, 2.0)
    tokens = prompt(draw(st.sampled_from([1, 15, 16, 17, 40])), draw(st.integers(0, 5)))
    engine = shared(build)
    engine.engine.committer.eos_token_ids = eos
    request = generate("r", tokens, new, search=search, ignore_eos=False, shaping={"logit_bias": bias})
    answer = engine.generate(request)[0]
    assert answer.error is None, answer.error
    assert answer.tokens() == reference(dequantized, tokens, new, search, eos, bias)
    assert engine.engine.scheduler.allocator.used == 0


def test_an_alpha_of_zero_is_greedy(build: Any, generate: Any) -> None:
    engine = shared(build)
    engine.engine.committer.eos_token_ids = (1,)
    greedy, search = engine.generate(
        generate("g", prompt(20), 15), generate("c", prompt(20), 15, search=ContrastiveSearch(4, 0.0))
    )
    assert search.tokens() == greedy.tokens()


def test_tokens_are_shown_once_chosen_under_one_index(build: Any, generate: Any) -> None:
    """One token a step behind the first candidates; log-probabilities are those of the text."""
    engine: LocalEngine = build()
    answer = engine.generate(generate("r", prompt(20), 9, search=ContrastiveSearch(4, 0.6), logprobs=1))[0]
    sent = [message for message in engine.messages if isinstance(message, Tokens)]
    assert [len(message.token_ids) for message in sent] == [1] * 9 and {message.index for message in sent} == {0}
    assert [message.finish for message in sent] == [None] * 8 + [FinishReason.LENGTH]
    completion = answer.completions[0]
    text = prompt(20) + completion.token_ids
    score = engine.generate(generate("s", text, 0, prompt_logprobs_from=20, logprobs=1))[0]
    assert score.prompt_logprobs is not None
    assert [each.token_id for each in completion.logprobs] == completion.token_ids
    for one, other in zip(completion.logprobs, score.prompt_logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize("budget", [7, 16, 33, 200])
@pytest.mark.parametrize("scored", [None, 5])
def test_a_prompt_is_observed_whole_however_it_is_run(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, budget: int, scored: int | None
) -> None:
    """In chunks, behind a cached prefix, which it does not take, and with its log-probabilities wanted; others take the
    blocks that it leaves."""
    tokens, search = prompt(70), ContrastiveSearch(3, 0.7)
    wanted = reference(dequantized, tokens, 6, search)
    engine: LocalEngine = build(token_budget=budget)
    engine.generate(generate("before", tokens))
    request = generate("r", tokens, 6, search=search, prompt_logprobs_from=scored, logprobs=1)
    answer = engine.generate(request)[0]
    assert answer.tokens() == wanted
    assert answer.started is not None and answer.started.cached_tokens == 0
    assert scored is None or answer.prompt_logprobs is not None
    after = engine.generate(generate("after", tokens))[0]
    assert after.started is not None and after.started.cached_tokens == 64


@pytest.mark.parametrize("steps", [1, 3, 6, 12])
def test_preemption_keeps_the_hidden_states(build: Any, generate: Any, steps: int) -> None:
    """In the middle of a prompt and of an answer; what comes back takes the blocks that are still cached."""
    engine: LocalEngine = build(token_budget=16)
    request = generate("r", prompt(60), 20, search=ContrastiveSearch(4, 0.7))
    wanted = build().generate(request)[0].tokens()
    engine.send(request)
    for _ in range(steps):
        engine.step()
    scheduler = engine.engine.scheduler
    scheduler._preempt(scheduler.running[0])
    assert not scheduler.running and scheduler.allocator.used == 0
    engine.run()
    assert engine.answers["r"].tokens() == wanted
    assert sum(isinstance(message, Started) for message in engine.messages) == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("way", ["abort", "time limit"])
def test_ends_from_outside_show_nothing_that_is_held(build: Any, generate: Any, steps: int, way: str) -> None:
    now = 1000.0
    engine: LocalEngine = build(token_budget=16)
    engine.engine.clock = lambda: now
    request = generate("r", prompt(20), 20, search=ContrastiveSearch(4, 0.6), time_limit=5.0, arrival=now)
    wanted = build().generate(generate("w", prompt(20), 20, search=ContrastiveSearch(4, 0.6)))[0].tokens()
    engine.send(request)
    for _ in range(steps):
        engine.step()
    if way == "abort":
        engine.send(Abort("r", 0))
    else:
        now += 6
    engine.step()
    engine.engine.check()
    completion = engine.answers["r"].completions[0]
    assert completion.token_ids == wanted[: max(0, steps - 2)]
    assert completion.finish is (FinishReason.ABORTED if way == "abort" else FinishReason.TIME_LIMIT)
    strategy: Any = engine.engine.committer.strategy.inner.inner  # type: ignore[attr-defined]
    assert not strategy.searches[ContrastiveSearch]._texts


def test_only_a_step_with_a_contrastive_row_takes_hidden_states(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    strategy: Any = engine.engine.committer.strategy.inner.inner  # type: ignore[attr-defined]
    given: list[tuple[bool, bool]] = []
    decide = strategy.decide

    def watching(rows: Any, logits: Any, hidden_states: Any = None) -> Any:
        given.append((any(row.sampling.search for row in rows), hidden_states is not None))
        return decide(rows, logits, hidden_states)

    strategy.decide = watching
    engine.generate(generate("g", prompt(9), 20), generate("c", prompt(9), 5, search=ContrastiveSearch(2, 0.5)))
    assert set(given) == {(True, True), (False, False)}
