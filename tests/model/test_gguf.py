"""GGUF files written here, with llama.cpp's layout, against the transformers models that they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.load import load_model
from lorry.server.model.readers.gguf import GGUFCheckpoint, llama3_scaling, unpermute
from lorry.server.model.store import convert_gguf

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = [*BYTES, "Ġt", "he", "Ġthe", "12", "123"] + [f"<unused{i}>" for i in range(36)] + ["<s>", "</s>", "<tool>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3"]


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter stores q and k: the halves of each head interleaved."""
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    )


def write_gguf(
    path: Path, model: Any, arch: str, kind: gguf.GGMLQuantizationType, pre: str = "smollm", **extra: Any
) -> dict[str, Tensor]:
    """Write `model` with its 2D tensors as `kind`; returns the tensors that the file says, by their HF names."""
    config = model.config
    out = gguf.GGUFWriter(str(path), arch)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        out.add_key_length(config.head_dim)
        out.add_value_length(config.head_dim)
    out.add_tokenizer_model(extra.pop("tokenizer", "gpt2"))
    out.add_tokenizer_pre(pre)
    out.add_token_list(TOKENS)
    out.add_token_types([1] * 297 + [3, 3, 4])
    out.add_token_merges(MERGES)
    out.add_bos_token_id(297)
    out.add_eos_token_id(298)
    out.add_chat_template("{{ messages[0]['content'] }}")
    factors = extra.pop("rope_freqs", None)
    for key, value in extra.items():
        name = f"{arch}.{key.replace('__', '.')}"
        if isinstance(value, str):
            out.add_string(name, value)
        elif isinstance(value, float):
            out.add_float32(name, value)
        else:
            out.add_uint32(name, value)
    if factors is not None:
        out.add_tensor("rope_freqs.weight", factors.numpy())
    said = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = tensor.float()
        stored = tensor
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = permuted(tensor, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stem, suffix = name.rsplit(".", 1)
        layer = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            layer = f"blk.{index}."
        used = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(stored.numpy()), used)
        out.add_tensor(f"{layer}{NAMES[stem]}.{suffix}", data, raw_dtype=used)
        values = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), used), used))
        said[name] = values.reshape(tensor.shape)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return said


KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    ("arch", "shape", "kind"),
    [
        ("llama", SHAPE, KINDS.F32),
        ("llama", {**SHAPE, "tie_word_embeddings": True, "num_key_value_heads": 3}, KINDS.F16),
        ("llama", {**SHAPE, "rope_parameters": LLAMA3}, KINDS.Q8_0),
        ("qwen2", SHAPE, KINDS.Q5_1),
        ("qwen3", {**SHAPE, "head_dim": 32}, KINDS.BF16),
    ],
    ids=["llama-f32", "llama-tied-f16", "llama3-q8_0", "qwen2-q5_1", "qwen3-bf16"],
)
def test_logits_equal_the_model_that_was_written(
    arch: str, shape: dict[str, Any], kind: Any, tools: Any, tmp_path: Path
) -> None:
    model = tools.tiny_model(arch, torch.float32, **shape)
    extra = {}
    if "rope_parameters" in shape:
        plain = 1.0 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
        extra["rope_freqs"] = plain / model.model.rotary_emb.inv_freq
    said = write_gguf(tmp_path / "tiny.gguf", model, arch, kind, **extra)
    half = {KINDS.F16: torch.float16, KINDS.F32: torch.float32}.get(kind, torch.bfloat16)
    for name, tensor in said.items():
        if "_proj" in name and tensor.dim() == 2:
            in_blocks = kind in (KINDS.Q8_0, KINDS.Q5_1)
            said[name] = tensor if in_blocks else tensor.to(half).float()
        else:
            said[name] = tensor.to(half).float()
    model.load_state_dict(said, strict=False)
    stages: list[tuple[str, int, int]] = []
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "nf4", lambda *stage: stages.append(stage))
    assert stages[-1] == ("quantize", 2, 2)

    decoder = load_model(str(tmp_path / "nf4"))
    assert decoder.config.eos_token_ids == (298,)
    assert decoder.config.context_length == 64
    prompts = [list(range(100, 139)), [7, 3, 99]]
    actual = tools.paged_logits(decoder, prompts, chunks=[(17, 19), (3,)])
    expected = tools.reference_logits(tools.dequantized_base(model), prompts)
    for ours, theirs in zip(actual, expected, strict=True):
        assert tools.relative_rms(ours, theirs) < 1e-4


def test_unpermute_is_the_inverse_of_the_converter() -> None:
    rows = torch.arange(3 * 10 * 7).view(30, 7)
    assert not torch.equal(permuted(rows, 3), rows)
    assert torch.equal(unpermute(permuted(rows, 3), 3), rows)
    assert torch.equal(unpermute(permuted(rows[:, 0], 3), 3), rows[:, 0])


def test_foreign_rope_factors_are_refused() -> None:
    config = {"head_dim": 64, "max_position_embeddings": 64, "rope_theta": 500000.0}
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        llama3_scaling(torch.linspace(1, 4, 32), config)


@pytest.mark.parametrize(
    ("arch", "extra", "word"),
    [
        ("gemma", {}, "gemma"),
        ("llama", {"expert_count": 4}, "experts"),
        ("llama", {"attention__clamp_kqv": 3.0}, "clamp_kqv"),
        ("llama", {"rope__scaling__type": "longrope"}, "longrope"),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ("llama", {"rope__dimension_count": 32}, "rope.dimension_count"),
        ("llama", {"tokenizer": "llama"}, "tokenizer model 'llama'"),
        ("llama", {"pre": "deepseek-llm"}, "deepseek-llm"),
    ],
)
def test_refused_by_name(arch: str, extra: dict[str, Any], word: str, tools: Any, tmp_path: Path) -> None:
    model = tools.tiny_model("llama", torch.float32, **SHAPE)
    write_gguf(tmp_path / "tiny.gguf", model, arch, KINDS.F32, **extra)
    with pytest.raises(UnsupportedModel, match=word):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 2.0,
                "rope__scaling__original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        ),
        ({"rope__scaling__type": "none"}, None),
    ],
)
def test_rope_scaling(written: dict[str, Any], read: Any, tools: Any, tmp_path: Path) -> None:
    model = tools.tiny_model("llama", torch.float32, **SHAPE)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", KINDS.F32, **written)
    assert GGUFCheckpoint(tmp_path / "tiny.gguf").hf_config["rope_scaling"] == read


def test_sliding_window_of_llama_means_mistral(tools: Any, tmp_path: Path) -> None:
    model = tools.tiny_model("llama", torch.float32, **SHAPE)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", KINDS.F32, attention__sliding_window=17)
    config = GGUFCheckpoint(tmp_path / "tiny.gguf").config
    assert (config.architecture, config.sliding_windows) == ("MistralForCausalLM", (17, 17))


def test_a_truncated_file_is_malformed(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tools.tiny_model("llama", torch.float32, **SHAPE), "llama", KINDS.F32)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(MalformedCheckpoint, match=r"tiny\.gguf"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["Ġthe", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġthe", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "Ġthe", "Ġ", "123", "4"]),
    ],
)
def test_tokenizer_splits_as_its_pre_tokenizer_says(pre: str, pieces: list[str], tools: Any, tmp_path: Path) -> None:
    model = tools.tiny_model("llama", torch.float32, **SHAPE)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", KINDS.F32, pre=pre)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "nf4")
    tokenizer = Tokenizer.from_file(str(tmp_path / "nf4" / "tokenizer.json"))
    assert tokenizer.encode(" the 1234").tokens == pieces
    encoded = tokenizer.encode("a<s>b<tool>", add_special_tokens=False)
    assert encoded.tokens == ["a", "<s>", "b", "<tool>"]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]
    assert tokenizer.decode(encoded.ids) == "ab<tool>"
    text = "Ünïcode 日本語 😀 the\n\n  the\t12x"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    config = json.loads((tmp_path / "nf4" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages[0]['content'] }}"
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
