"""ModelConfig against transformers' own config classes and rotary embeddings, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.rope_table import Rope

SHAPE: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 85,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "max_position_embeddings": 150,
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 31000.0},
    "linear": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 3.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 70,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 70,
    },
    "yarn-all": {
        "rope_type": "yarn",
        "rope_theta": 700.0,
        "factor": 6.0,
        "original_max_position_embeddings": 50,
        "beta_fast": 9.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "rope_theta": 700.0,
        "factor": 6.0,
        "original_max_position_embeddings": 50,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("written", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_equals_transformers(name: str, written: str) -> None:
    """Both ways of writing the scaling give transformers' cosines and sines."""
    rope = dict(ROPES[name])
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE}
    if written == "rope_scaling":
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = None if name == "default" else rope
    else:
        raw["rope_parameters"] = rope
    config = ModelConfig.from_hf(raw)

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE, rope_parameters=dict(ROPES[name])))
    positions = torch.arange(150)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    table = config.rope.table(config.head_dim, 150)
    half = config.head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=3e-6)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=3e-6)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7, "head_dim": 14}),
    "mistral-full": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-unused-window": ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 9}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 22, "tie_word_embeddings": True, "attention_bias": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_transformers(family: str) -> None:
    """What we read from the config.json that transformers writes is what its modules have."""
    architecture, extra = FAMILIES[family]
    hf = AutoConfig.for_model(family.split("-")[0], **SHAPE, **extra)
    model = AutoModelForCausalLM.from_config(hf)
    raw = {**hf.to_dict(), "architectures": [architecture]}
    config = ModelConfig.from_hf(raw)

    layer = model.model.layers[0]
    modules = {name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    modules |= {name: getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
    for site, shape in config.linear_shapes().items():
        assert tuple(modules[site].weight.shape) == shape, site
        assert (modules[site].bias is not None) == config.biased(site), site
    assert config.qk_norm == hasattr(layer.self_attn, "q_norm")
    assert config.tie_embeddings == bool(hf.tie_word_embeddings)
    windows = tuple(getattr(la.self_attn, "sliding_window", None) or 0 for la in model.model.layers)
    if architecture == "MistralForCausalLM":
        windows = (hf.sliding_window or 0,) * 3
    assert config.sliding_windows == windows
    assert (config.layers, config.heads, config.kv_heads, config.vocab_size) == (3, 5, 1, 97)


def test_missing_keys_have_transformers_defaults() -> None:
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        hf = AutoConfig.for_model(model_type)
        config = ModelConfig.from_hf({"model_type": model_type})
        assert config.hidden_size == hf.hidden_size
        assert config.intermediate_size == hf.intermediate_size
        assert config.layers == hf.num_hidden_layers
        assert (config.heads, config.kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
        assert config.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
        assert (config.vocab_size, config.context_length) == (hf.vocab_size, hf.max_position_embeddings)
        assert (config.rms_eps, config.tie_embeddings) == (hf.rms_norm_eps, hf.tie_word_embeddings)
        assert config.rope.theta == hf.rope_parameters["rope_theta"]
        assert set(config.sliding_windows) == {getattr(hf, "sliding_window", None) or 0}
        assert config.eos_token_ids == (() if hf.eos_token_id is None else (hf.eos_token_id,))


def test_eos_ids_of_both_files() -> None:
    raw = {"architectures": ["LlamaForCausalLM"], **SHAPE, "eos_token_id": [7, 5]}
    assert ModelConfig.from_hf(raw, {"eos_token_id": [5, 11]}).eos_token_ids == (5, 11, 7)
    assert ModelConfig.from_hf(raw).eos_token_ids == (7, 5)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "architectures", "MixtralForCausalLM"),
    ({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}, "architectures", "SmolLM3ForCausalLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForSequenceClassification"),
    ({}, "architectures", "unnamed"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act", "gelu"),
    ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type", "dynamic"),
    ({**LLAMA, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type", "longrope"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor", "factor"),
    ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, "odd", "odd"),
    ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters", "layer type"),
    ({**LLAMA, "head_dim": 13}, "head_dim", "13"),
    (
        {"architectures": ["Qwen2ForCausalLM"], **SHAPE, "layer_types": ["full_attention", "linear_attention", "x"]},
        "layer_types",
        "linear_attention",
    ),
]


@pytest.mark.parametrize(("raw", "field", "word"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_by_name(raw: dict[str, Any], field: str, word: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_hf(raw)
    assert caught.value.fields["field"] == field
    assert word in caught.value.message


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_nonsense_is_malformed(key: str) -> None:
    with pytest.raises(MalformedCheckpoint) as caught:
        ModelConfig.from_hf({**LLAMA, key: 0})
    assert caught.value.fields["field"] == key


def test_rope_without_scaling_keeps_its_base() -> None:
    assert Rope.from_hf({"rope_theta": 123.0, "rope_scaling": None}, 10) == Rope(theta=123.0)
