"""Every family against transformers on random models: chunked prefill and decode over a paged cache."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.kernels import native
from lorry.kernels.layers import Layers
from lorry.server.cache.kv_cache import KVCache
from lorry.server.model.inputs import ModelInputs
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
    "mistral-window": ("mistral", {**WIDE, **REST, "sliding_window": 19, "num_attention_heads": 4, "head_dim": 32}),
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


@pytest.mark.parametrize("native_kernels", [True, False])
def test_logits_with_a_cache_in_e4m3(
    native_kernels: bool, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near those of a cache in float32, with the C kernels and without."""
    model_type, shape = MODELS["llama"]
    tools.tiny_model(model_type, torch.float32, **shape).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path))
    exact = tools.paged_logits(decoder, prompts(), chunks=CHUNKS)
    if not native_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
        decoder = load_model(str(tmp_path))
    actual = tools.paged_logits(decoder, prompts(), chunks=CHUNKS, kv_dtype=torch.float8_e4m3fn)
    error = max(tools.relative_rms(*pair) for pair in zip(actual, exact, strict=True))
    assert 1e-3 < error < 6e-2


def test_a_sequence_alone_equals_itself_in_a_batch(tools: Any, tmp_path: Path) -> None:
    """Token by token alone, or in chunks among others: equal but for the order of sums in the attention."""
    model_type, shape = MODELS["llama"]
    tools.tiny_model(model_type, torch.float32, **shape).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path))
    batched = tools.paged_logits(decoder, prompts(), chunks=CHUNKS, seed=1)
    for ids, together in zip(prompts(), batched, strict=True):
        alone = tools.paged_logits(decoder, [ids], chunks=[()], seed=2)[0]
        assert tools.relative_rms(alone, together) < 1e-6


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [name for name, (_, shape) in MODELS.items() if shape["hidden_size"] == 192])
def test_all_layers_in_one_call_give_the_bits_of_one_by_one(
    name: str, kv_dtype: torch.dtype, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, shape = MODELS[name]
    tools.tiny_model(model_type, torch.float32, **shape).save_pretrained(tmp_path)
    calls: list[int] = []
    forward = Layers.forward

    def counted(self: Layers, hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(len(hidden))
        return forward(self, hidden, *arguments)

    monkeypatch.setattr(Layers, "forward", counted)
    together = tools.paged_logits(load_model(str(tmp_path)), prompts(), chunks=CHUNKS, kv_dtype=kv_dtype)
    assert sum(calls) == sum(LENGTHS)
    monkeypatch.setattr(Layers, "serve", staticmethod(lambda *_: False))
    one_by_one = tools.paged_logits(load_model(str(tmp_path)), prompts(), chunks=CHUNKS, kv_dtype=kv_dtype)
    assert sum(calls) == sum(LENGTHS)
    assert all(map(torch.equal, together, one_by_one))


def test_layers_refuse_what_is_not_there(tools: Any, tmp_path: Path) -> None:
    tools.tiny_model("llama", torch.float32, **MODELS["llama"][1]).save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path))
    cache = KVCache(3, 1, 64, 2, torch.float32)
    inputs = ModelInputs(
        token_ids=torch.tensor([1]),
        positions=torch.tensor([0]),
        slot_mapping=torch.tensor([0]),
        cu_seqlens_q=torch.tensor([0, 1]).int(),
        kv_lens=torch.tensor([1]).int(),
        block_tables=torch.tensor([[0, 1]]).int(),
        segments=None,
        logits_rows=torch.tensor([0]),
    )
    assert decoder.forward(inputs, cache).isfinite().all()
    with pytest.raises(IndexError, match=r"positions must lie in 0\.\.119"):
        decoder.forward(dataclasses.replace(inputs, positions=torch.tensor([120])), cache)
    with pytest.raises(IndexError, match=r"slot_mapping must lie in -1\.\.31"):
        decoder.forward(dataclasses.replace(inputs, slot_mapping=torch.tensor([32])), cache)


def test_context_length(tools: Any, tmp_path: Path) -> None:
    tools.tiny_model("llama", torch.float32, **MODELS["llama"][1]).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.context_length == 120
    assert load_model(str(tmp_path), context_length=64).config.context_length == 64
    with pytest.raises(Exception, match="120"):
        load_model(str(tmp_path), context_length=121)
