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


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_are_those_of_the_paper(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, data: st.DataObject
) -> None:
    draw = data.draw
    search = ContrastiveSearch(draw(st.integers(2, 9)), draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])))
    new = draw(st.integers(1, 12))
    eos = tuple(draw(st.sets(st.integers(1, 130), max_size=2)))
    bias = {token_id: 2.0 for token_id in eos}
    tokens = prompt(draw(st.sampled_from([1, 15, 16, 17, 40])), draw(st.integers(0, 5)))
    engine = shared(build)
    engine.engine.committer.eos_token_ids = eos
    request = generate("r", tokens, new, search=search, ignore_eos=False, shaping={"logit_bias": bias})
    answer = engine.generate(request)[0]
    assert answer.error is None, answer.error
    assert answer.tokens() == reference(dequantized, tokens, new, search, eos, bias)
    assert engine.engine.scheduler.allocator.used == 0
