"""Writes GGUF files as llama.cpp's converter would, from tiny transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.gguf_writer import GGUFWriter
from gguf.quants import dequantize, quantize
from torch import Tensor

Kinds = GGMLQuantizationType

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
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
    path: Path, model: Any, arch: str, kind: GGMLQuantizationType, pre: str = "smollm", **extra: Any
) -> dict[str, Tensor]:
    """Write `model` with its 2D tensors as `kind`; returns the tensors that the file says, by their HF names."""
    config = model.config
    out = GGUFWriter(str(path), arch)
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
        used = kind if tensor.dim() == 2 else Kinds.F32
        data = quantize(np.ascontiguousarray(stored.numpy()), used)
        out.add_tensor(f"{layer}{NAMES[stem]}.{suffix}", data, raw_dtype=used)
        values = torch.from_numpy(dequantize(quantize(tensor.numpy(), used), used))
        said[name] = values.reshape(tensor.shape)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return said
