"""GGUF files written here, with llama.cpp's layout, against the transformers models that they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import SHAPE, TOKENS, Kinds, permuted, write_gguf
from tokenizers import Tokenizer

from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.load import load_model
from lorry.server.model.readers.gguf import GGUFCheckpoint, llama3_scaling, unpermute
from lorry.server.model.store import convert_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("arch", "shape", "kind"),
    [
        ("llama", SHAPE, Kinds.F32),
        ("llama", {**SHAPE, "tie_word_embeddings": True, "num_key_value_heads": 3}, Kinds.F16),
        ("llama", {**SHAPE, "rope_parameters": LLAMA3}, Kinds.Q8_0),
        ("qwen2", SHAPE, Kinds.Q5_1),
        ("qwen3", {**SHAPE, "head_dim": 32}, Kinds.BF16),
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
    half = {Kinds.F16: torch.float16, Kinds.F32: torch.float32}.get(kind, torch.bfloat16)
    for name, tensor in said.items():
        if "_proj" in name and tensor.dim() == 2:
            in_blocks = kind in (Kinds.Q8_0, Kinds.Q5_1)
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
    write_gguf(tmp_path / "tiny.gguf", model, arch, Kinds.F32, **extra)
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
    write_gguf(tmp_path / "tiny.gguf", model, "llama", Kinds.F32, **written)
    assert GGUFCheckpoint(tmp_path / "tiny.gguf").hf_config["rope_scaling"] == read


def test_sliding_window_of_llama_means_mistral(tools: Any, tmp_path: Path) -> None:
    model = tools.tiny_model("llama", torch.float32, **SHAPE)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", Kinds.F32, attention__sliding_window=17)
    config = GGUFCheckpoint(tmp_path / "tiny.gguf").config
    assert (config.architecture, config.sliding_windows) == ("MistralForCausalLM", (17, 17))


def test_a_truncated_file_is_malformed(tools: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tools.tiny_model("llama", torch.float32, **SHAPE), "llama", Kinds.F32)
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
    write_gguf(tmp_path / "tiny.gguf", model, "llama", Kinds.F32, pre=pre)
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
