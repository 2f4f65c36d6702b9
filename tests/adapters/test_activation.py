"""Where an activated LoRA begins: PEFT's own search is the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from lorry.adapters.activation import activation


@pytest.mark.parametrize(
    ("prompt", "tokens", "start"),
    [
        ([7, 8, 1], (7, 8), 0),
        ([1, 7, 8], (7, 8), 1),
        ([7, 8, 7, 8, 1], (7, 8), 2),
        ([7, 7, 7], (7, 7), 1),
        ([1, 2, 7], (7,), 2),
        ([7, 1, 8, 7], (7, 8), None),
        ([7], (7, 8), None),
        ([], (7,), None),
        ([1, 2], (10**12,), None),
        ([3, 4], (3, 4), 0),
    ],
)
def test_the_last_match_counts(prompt: list[int], tokens: tuple[int, ...], start: int | None) -> None:
    assert activation(prompt, tokens) == start


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_it_is_where_peft_finds_it(prompt: list[int], tokens: list[int]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
    offset = calculate_alora_offsets({"a": config}, "a", torch.tensor([prompt]))[0]
    assert activation(prompt, tuple(tokens)) == (None if offset is None else len(prompt) - offset)
