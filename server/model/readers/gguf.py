"""A .gguf file as a checkpoint: dequantized tensor by tensor, with Hugging Face's names and layout.

llama.cpp stores q and k of the `llama` architecture with the rows of each head permuted, so that its rotary
embedding may turn neighbouring dimensions (2i, 2i+1) where Hugging Face turns (i, i + D/2):

    gguf[h, i, half] = hf[h, half, i],   h: head, i: 0..D/2-1, half: 0..1

Qwen files are stored unpermuted. Sources: the GGUF specification, `convert_hf_to_gguf.py` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType
from gguf.gguf_reader import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.rope_table import Rope
from lorry.server.model.weights import EMBEDDING, FINAL_NORM, HEAD, LinearWeight

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}

_MODULES = {
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

_SHAPE_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}

# checked below, or without influence on the numbers
_OTHER_KEYS = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "expert_count",
    "expert_used_count",
}

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}

_ROPE_FREQS = "rope_freqs.weight"


class GGUFCheckpoint:
    """`Checkpoint` of a .gguf file; linears come as floating-point tensors.

    `hf_config` is the config.json that says the same as the file's metadata. Linears stored in blocks come as
    float32, others in their own dtype; everything else has the embedding's dtype, which is bfloat16 where the
    embedding is stored in blocks: transformers wants one dtype for all that is not quantized.

    Raises UnsupportedModel naming the architecture or the metadata key that is not served.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._reader = GGUFReader(path)
        except Exception as error:
            raise MalformedCheckpoint(f"{path.name} is not a whole GGUF file: {error}", field=path.name) from error
        self.metadata = {
            key: field.contents() for key, field in self._reader.fields.items() if not key.startswith("GGUF.")
        }
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._left = set(self._tensors)
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise UnsupportedModel(
                f"GGUF architecture {self.architecture!r} is not served; served: {', '.join(_ARCHITECTURES)}",
                field="general.architecture",
            )
        if int(self.metadata.get("split.count", 1)) > 1:
            raise UnsupportedModel("a GGUF model split into several files is not served", field="split.count")
        self.hf_config = self._hf_config()
        self.config = ModelConfig.from_hf(self.hf_config)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._take(name, shape).to(self._dtype)

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        name = f"{module}.weight"
        return self.tensor(name, shape) if module == HEAD else self._take(name, shape)

    def close(self) -> None:
        if self._left:
            name = min(self._left)
            raise MalformedCheckpoint(
                f"{len(self._left)} tensors are not part of this architecture, the first is {name!r}", field=name
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._tensors.get(_gguf_name(name))
        if stored is None:
            raise MalformedCheckpoint(f"tensor {_gguf_name(name)!r} is missing", field=_gguf_name(name))
        self._left.discard(stored.name)
        tensor = _floats(stored)
        if tuple(tensor.shape) != shape:
            raise MalformedCheckpoint(
                f"tensor {stored.name!r} has shape {list(tensor.shape)}; {list(shape)} is expected",
                field=stored.name,
            )
        if self.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = unpermute(tensor, self.config.heads if "q_proj" in name else self.config.kv_heads)
        return tensor

    def _hf_config(self) -> dict[str, Any]:
        prefix = f"{self.architecture}."
        known = {key[len(prefix) :]: value for key, value in self.metadata.items() if key.startswith(prefix)}
        unknown = sorted(set(known) - set(_SHAPE_KEYS) - _OTHER_KEYS)
        if unknown:
            raise UnsupportedModel(f"GGUF key {prefix + unknown[0]!r} is not served", field=prefix + unknown[0])
        if known.get("expert_count"):
            raise UnsupportedModel("mixtures of experts are not served", field=f"{prefix}expert_count")
        hf_name, model_type = _ARCHITECTURES[self.architecture]
        if known.get("attention.sliding_window") and self.architecture == "llama":
            hf_name, model_type = "MistralForCausalLM", "mistral"
        config: dict[str, Any] = {"architectures": [hf_name], "model_type": model_type, "hidden_act": "silu"}
        config |= {_SHAPE_KEYS[key]: value for key, value in known.items() if key in _SHAPE_KEYS}
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
            if not isinstance(config.get(key), int):
                raise MalformedCheckpoint(f"{key} is {config.get(key)!r} in the GGUF metadata", field=key)
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise MalformedCheckpoint("tensor 'token_embd.weight' is missing", field="token_embd.weight")
        config["vocab_size"] = int(embedding.shape[1])
        self._dtype = _FLOATS.get(embedding.tensor_type, torch.bfloat16)
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config.setdefault("rope_theta", 10000.0)
        for key in ("attention.value_length", "rope.dimension_count"):
            if known.get(key, config["head_dim"]) != config["head_dim"]:
                raise UnsupportedModel(
                    f"{prefix}{key} {known[key]} differs from the head dimension {config['head_dim']}",
                    field=prefix + key,
                )
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        if "sliding_window" in config and model_type != "mistral":
            config["use_sliding_window"] = True
            config["max_window_layers"] = 0
        biased = "blk.0.attn_q.bias" in self._tensors
        if biased and model_type != "qwen2":
            config["attention_bias"] = True
        config["rope_scaling"] = self._rope_scaling(known, config)
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        for hf_key, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            config[hf_key] = None if value is None else int(value)
        return config

    def _rope_scaling(self, known: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
        kind = known.get("rope.scaling.type", "none")
        freqs = self._tensors.get(_ROPE_FREQS)
        if kind == "none" and freqs is None:
            return None
        if freqs is not None:
            self._left.discard(_ROPE_FREQS)
            return llama3_scaling(_floats(freqs).float(), config)
        scaling = {"rope_type": kind, "factor": float(known.get("rope.scaling.factor", 1.0))}
        if "rope.scaling.original_context_length" in known:
            scaling["original_max_position_embeddings"] = int(known["rope.scaling.original_context_length"])
        return scaling


def llama3_scaling(factors: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """The llama3 rope parameters whose inverse frequencies are the plain ones divided by `factors` [D/2].

    Raises UnsupportedModel when the factors are not those of a Llama 3 model.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim, length = int(config["head_dim"]), int(config["max_position_embeddings"])
    plain = Rope.from_hf({"rope_theta": config["rope_theta"]}, length).inv_freq(head_dim)
    scaled = Rope.from_hf({"rope_theta": config["rope_theta"], "rope_scaling": scaling}, length).inv_freq(head_dim)
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
        raise UnsupportedModel(f"the frequencies in {_ROPE_FREQS} are not those of Llama 3", field=_ROPE_FREQS)
    return scaling


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection [heads * D, ...] (or its bias) from llama.cpp's order to Hugging Face's."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    ends = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", f"{HEAD}.weight": "output.weight"}
    if name in ends:
        return ends[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_MODULES[module]}.{kind}"


def _floats(stored: Any) -> Tensor:
    """The values of a GGUF tensor, in its own dtype when it is a float dtype, else float32."""
    kind = stored.tensor_type
    shape = tuple(int(size) for size in reversed(stored.shape))
    if kind in _FLOATS:
        return torch.from_numpy(stored.data.copy()).view(_FLOATS[kind]).reshape(shape)
    try:
        return torch.from_numpy(dequantize(stored.data, kind)).reshape(shape)
    except NotImplementedError as error:
        raise UnsupportedModel(f"GGUF tensor type {kind.name} is not served", field=stored.name) from error


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: the special token ids, ends of turn among the ends of sequence."""
    ids = {
        name: int(metadata[f"tokenizer.ggml.{name}_token_id"])
        for name in ("bos", "eos", "eot", "eom", "padding")
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    config: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    if "bos" in ids:
        config["bos_token_id"] = ids["bos"]
    if "padding" in ids:
        config["pad_token_id"] = ids["padding"]
    return config
