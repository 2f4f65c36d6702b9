"""Whole texts against transformers' `generate` on a tiny random Llama in float32: same scores, same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from lorry.server.decoding.interface import Row
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.sampling import Sampling
from lorry.server.decoding.truncation import Truncation, kept
from lorry.server.params import StoppingParams

VOCABULARY = 61
EOS = 7
NEW = 14
few = st.integers(0, VOCABULARY - 1)

# Our fields, as `generate` knows them, each with values of ours.
PROCESSORS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], dict[str, Any]]]] = {
    "repetition_penalty": (st.sampled_from([0.8, 1.5]), lambda value: {"repetition_penalty": value}),
    "no_repeat_ngram_size": (st.sampled_from([1, 2, 3]), lambda value: {"no_repeat_ngram_size": value}),
    "bad_words": (
        st.lists(
            st.lists(few.filter(lambda t: t != EOS), min_size=1, max_size=2).map(tuple), min_size=1, max_size=20
        ).map(tuple),
        lambda value: {"bad_words_ids": [list(word) for word in value]},
    ),
    "logit_bias": (
        st.dictionaries(few, st.sampled_from([-5.0, 2.0]), min_size=1, max_size=9),
        lambda value: {"sequence_bias": {(token,): bias for token, bias in value.items()}},
    ),
    "allowed_token_ids": (
        st.lists(few, min_size=2, max_size=40, unique=True).map(tuple),
        lambda value: {"prefix_allowed_tokens_fn": lambda *_: list(value)},
    ),
}
CUTS: dict[str, st.SearchStrategy[Any]] = {
    "top_k": st.integers(2, 40),
    "top_p": st.floats(0.1, 0.95),
    "min_p": st.floats(0.01, 0.6),
    "typical_p": st.floats(0.1, 0.95),
    "epsilon_cutoff": st.floats(0.003, 0.1),
    "eta_cutoff": st.floats(0.003, 0.1),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64, initializer_range=0.5, eos_token_id=EOS, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def generated(model: LlamaForCausalLM, prompt: list[int], **options: Any) -> tuple[list[int], list[torch.Tensor]]:
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),  # a padding token in the prompt is a token
        max_new_tokens=NEW,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences[0, len(prompt) :].tolist(), [scores[0] for scores in found.scores]


@torch.no_grad()
def next_logits(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[:, -1].float()


processors = st.fixed_dictionaries({}, optional={name: values for name, (values, _) in PROCESSORS.items()})


@settings(deadline=None, max_examples=30, derandomize=True)
@given(prompt=st.lists(few, min_size=1, max_size=9), ours=processors, minimum=st.sampled_from([0, 0, 6]))
def test_greedy(
    model: LlamaForCausalLM, make_row: Callable[..., Row], prompt: list[int], ours: dict[str, Any], minimum: int
) -> None:
    theirs = {key: v for name, value in ours.items() for key, v in PROCESSORS[name][1](value).items()}
    tokens, scores = generated(model, prompt, do_sample=False, min_new_tokens=minimum or None, **theirs)
    output: list[int] = []
    row = make_row(
        prompt=prompt,
        output=output,
        eos=(EOS,),
        stopping=StoppingParams(NEW, min_new_tokens=minimum),
        temperature=0.0,
        **ours,
    )
    strategy = Sampling()
    for token, wanted in zip(tokens, scores, strict=True):
        logits = next_logits(model, prompt + output)
        changed = logits.clone()
        Processors().apply([row], changed)
        torch.testing.assert_close(changed[0], wanted, rtol=1e-5, atol=1e-4)
        assert strategy.decide([row], logits)[0].token_ids == (token,)
        output.append(token)


class Double(LogitsProcessor):  # type: ignore[misc]
    """What comes behind computes in float64, so that no rounding moves an end of what is left."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.double()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.75, 1.0, 2.0]),
    cuts=st.fixed_dictionaries({}, optional=CUTS),
    changes=st.fixed_dictionaries(
        {}, optional={name: PROCESSORS[name][0] for name in ("repetition_penalty", "bad_words")}
    ),
)
def test_sampling(
    model: LlamaForCausalLM,
    make_row: Callable[..., Row],
    seed: int,
    temperature: float,
    cuts: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    """The scores at every token of a text that transformers has drawn."""
    prompt = [3, seed % VOCABULARY, 9]
    theirs = {key: v for name, value in changes.items() for key, v in PROCESSORS[name][1](value).items()}
    torch.manual_seed(seed)
    tokens, scores = generated(
        model,
        prompt,
        do_sample=True,
        temperature=temperature,
        logits_processor=LogitsProcessorList([Double()]),
        **({"top_k": 0} | cuts),
        **theirs,
    )
    output: list[int] = []
    row = make_row(prompt=prompt, output=output, temperature=temperature, **cuts, **changes)
    for token, wanted in zip(tokens, scores, strict=True):
        logits = next_logits(model, prompt + output)
        Processors().apply([row], logits)
        low, high = kept(logits, Truncation.of([row])).bounds()
        found = logits[0].double() / temperature
        found[(logits[0] < low) | (logits[0] > high)] = -torch.inf
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        output.append(token)
