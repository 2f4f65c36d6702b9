"""What a checkpoint's config.json says about the decoder, reduced to what the forward pass needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.rope_table import Rope


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder of the Llama family.

    `sliding_windows` has one entry per layer: a query at position p sees keys at positions greater than p - window;
    0 means all. `eos_token_ids` come from config.json and generation_config.json together.
    """

    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope: Rope
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read a Hugging Face config.json (and generation_config.json for more end-of-sequence ids).

        Keys that the file leaves out have transformers' defaults for that architecture. Raises UnsupportedModel
        when the architecture, or anything it asks for, is not served exactly.
        """
        architecture, family = _architecture(config)
        values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
        for key in family.nullable:
            if key in config:
                values[key] = config[key]
        if values.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UnsupportedModel(f"hidden_act {values['hidden_act']!r} is not served; 'silu' is", field="hidden_act")
        layers, heads = _positive(values, "num_hidden_layers"), _positive(values, "num_attention_heads")
        hidden_size, context_length = _positive(values, "hidden_size"), _positive(values, "max_position_embeddings")
        kv_heads = int(values.get("num_key_value_heads") or heads)
        head_dim = int(values.get("head_dim") or hidden_size // heads)
        if kv_heads < 1 or heads % kv_heads:
            raise MalformedCheckpoint(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
                field="num_key_value_heads",
            )
        if head_dim % 2:
            raise UnsupportedModel(f"head_dim {head_dim} is odd; rotary embedding needs pairs", field="head_dim")
        attention_bias = bool(values.get("attention_bias", False)) and family.attention_bias
        return cls(
            architecture=architecture,
            layers=layers,
            hidden_size=hidden_size,
            intermediate_size=_positive(values, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(values, "vocab_size"),
            context_length=context_length,
            rms_eps=float(values["rms_norm_eps"]),
            rope=Rope.from_hf(config, context_length),
            tie_embeddings=bool(values["tie_word_embeddings"]),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=bool(values.get("mlp_bias", False)) and family.mlp_bias,
            qk_norm=family.qk_norm,
            sliding_windows=_sliding_windows(architecture, values, layers),
            eos_token_ids=_eos_token_ids(values, generation),
            bos_token_id=values.get("bos_token_id"),
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[N, K] of the seven linears of a layer, in the order of `lorry.kernels.lora.SITES`."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (q, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, q),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    def biased(self, site: str) -> bool:
        """Whether this linear has a bias."""
        if site in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if site == "o_proj" else self.mlp_bias


@dataclass(frozen=True)
class _Family:
    """How one transformers architecture differs, and the defaults of its config class."""

    defaults: Mapping[str, Any]
    nullable: tuple[str, ...] = ()  # keys whose explicit null is not their default
    attention_bias: bool = False  # the architecture reads the config's attention_bias
    mlp_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    model_type: str = ""


_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_hidden_layers": 32}
_QWEN = _COMMON | {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_LLAMA = _COMMON | {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_MISTRAL = _LLAMA | {
    "max_position_embeddings": 131072,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}

_FAMILIES = {
    "LlamaForCausalLM": _Family(_LLAMA, ("eos_token_id",), True, mlp_bias=True, model_type="llama"),
    "MistralForCausalLM": _Family(_MISTRAL, ("eos_token_id", "sliding_window"), model_type="mistral"),
    "Qwen2ForCausalLM": _Family(_QWEN, ("sliding_window",), qkv_bias=True, model_type="qwen2"),
    "Qwen3ForCausalLM": _Family(
        _QWEN | {"head_dim": 128}, ("sliding_window", "head_dim"), True, qk_norm=True, model_type="qwen3"
    ),
}

SERVED = tuple(_FAMILIES)


def _architecture(config: Mapping[str, Any]) -> tuple[str, _Family]:
    names = config.get("architectures") or []
    model_type = config.get("model_type")
    name = names[0] if names else next((n for n, f in _FAMILIES.items() if f.model_type == model_type), None)
    family = _FAMILIES.get(name) if name else None
    if name is None or family is None or (model_type and model_type != family.model_type):
        shown = " / ".join(str(part) for part in (names[0] if names else None, model_type) if part) or "unnamed"
        raise UnsupportedModel(
            f"architecture {shown} is not served; served: {', '.join(SERVED)}", field="architectures"
        )
    return name, family


def _positive(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or value < 1:
        raise MalformedCheckpoint(f"config.json: {key} is {value!r}; a positive integer is needed", field=key)
    return value


def _sliding_windows(architecture: str, values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Mistral: one window for all layers. Qwen: `layer_types`, or the layers from `max_window_layers` on."""
    window = int(values.get("sliding_window") or 0)
    if architecture == "LlamaForCausalLM":
        return (0,) * layers
    if architecture == "MistralForCausalLM":
        if values.get("layer_types"):
            raise UnsupportedModel("layer_types of Mistral are not served", field="layer_types")
        return (window,) * layers
    if not values.get("use_sliding_window"):
        window = 0
    types = values.get("layer_types")
    if types is None:
        first = int(values["max_window_layers"])
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if len(types) != layers:
        raise MalformedCheckpoint(f"layer_types has {len(types)} entries for {layers} layers", field="layer_types")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layer type {kind!r} is not served", field="layer_types")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _eos_token_ids(values: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for source in (generation or {}, values):
        ids = source.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None:
                found[int(token)] = None
    return tuple(found)
