"""Every family against transformers on random models: chunked prefill and decode over a paged cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.server.model.load import load_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 900.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 30,
}

# K % 64 == 0 takes the native product, the others do not
WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "head_dim": 64}
ODD: dict[str, Any] = {"hidden_size": 90, "intermediate_size": 77, "num_attention_heads": 5, "head_dim": 18}
REST: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "vocab_size": 211,
    "max_position_embeddings": 120,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**WIDE, **REST}),
    "llama-odd-tied": ("llama", {**ODD, **REST, "tie_word_embeddings": True, "num_key_value_heads": 5}),
    "llama-biases": ("llama", {**ODD, **REST, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**WIDE, **REST, "rope_parameters": LLAMA3, "num_hidden_layers": 2}),
    "mistral-window": ("mistral", {**WIDE, **REST, "sliding_window": 19, "head_dim": 32}),
    "mistral-full": ("mistral", {**ODD, **REST, "sliding_window": None}),
    "qwen2": ("qwen2", {**WIDE, **REST, "num_attention_heads": 6, "head_dim": 32, "num_key_value_heads": 3}),
    "qwen2-window": (
        "qwen2",
        {**ODD, **REST, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**WIDE, **REST, "tie_word_embeddings": True}),
    "qwen3-odd-window": (
        "qwen3",
        {
            **ODD,
            **REST,
            "head_dim": 22,
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
}

LENGTHS = (53, 16, 1, 38)
CHUNKS = ((21, 7, 17), (16,), (), (3, 30))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 211, (length,), generator=generator).tolist() for length in LENGTHS]


def assert_close(tools: Any, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for length, ours, theirs in zip(LENGTHS, actual, expected, strict=True):
        assert ours.shape == theirs.shape == (length, 211)
        assert ours.dtype == torch.float32
        assert tools.relative_rms(ours, theirs) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits(name: str, tools: Any, tmp_path: Path) -> None:
    model_type, shape = MODELS[name]
    model = tools.tiny_model(model_type, torch.float32, **shape)
    model.save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path))
    actual = tools.paged_logits(decoder, prompts(), chunks=CHUNKS)
    assert_close(tools, actual, tools.reference_logits(tools.dequantized_base(model), prompts()), 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_logits(name: str, tools: Any, tmp_path: Path) -> None:
    """A bfloat16 checkpoint computed in bfloat16 with a bfloat16 cache; then in float32, where W is code * absmax."""
    model_type, shape = MODELS[name]
    model = tools.tiny_model(model_type, torch.bfloat16, **shape)
    model.save_pretrained(tmp_path)
    wide = tools.dequantized_base(copy.deepcopy(model).float())
    expected = tools.reference_logits(tools.dequantized_base(model), prompts())
    decoder = load_model(str(tmp_path), dtype=torch.bfloat16)
    actual = tools.paged_logits(decoder, prompts(), chunks=CHUNKS, kv_dtype=torch.bfloat16)
    assert_close(tools, actual, expected, 2e-2)

    decoder = load_model(str(tmp_path))
    actual = tools.paged_logits(decoder, prompts(), chunks=CHUNKS)
    assert_close(tools, actual, tools.reference_logits(wide, prompts()), 1e-4)


def test_a_sequence_alone_equals_itself_in_a_batch(tools: Any, tmp_path: Path) -> None:
    """Token by token alone, or in chunks among others: equal but for the order of sums in the attention."""
    model_type, shape = MODELS["llama"]
    tools.tiny_model(model_type, torch.float32, **shape).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path))
    batched = tools.paged_logits(decoder, prompts(), chunks=CHUNKS, seed=1)
    for ids, together in zip(prompts(), batched, strict=True):
        alone = tools.paged_logits(decoder, [ids], chunks=[()], seed=2)[0]
        assert tools.relative_rms(alone, together) < 1e-6


def test_context_length(tools: Any, tmp_path: Path) -> None:
    tools.tiny_model("llama", torch.float32, **MODELS["llama"][1]).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.context_length == 120
    assert load_model(str(tmp_path), context_length=64).config.context_length == 64
    with pytest.raises(Exception, match="120"):
        load_model(str(tmp_path), context_length=121)
