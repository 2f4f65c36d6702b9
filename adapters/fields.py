"""Every field of PEFT's LoraConfig: served, without effect on inference, or refused by name.

Checked against PEFT 0.21. A field that this file does not know passes when it is null, false or empty.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorry.adapters.errors import UnsupportedField

SERVED = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)

WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # read when init_lora_weights is "corda"
        "ensure_weight_tying",  # concerns adapted embeddings and heads
        "eva_config",
        "inference_mode",
        "loftq_config",  # read when init_lora_weights is "loftq"
        "lora_dropout",  # training only
        "lora_ga_config",  # read when init_lora_weights is "lora_ga"
        "megatron_core",  # read when megatron_config is set
        "peft_version",
        "qalora_group_size",  # read when use_qalora is set
        "revision",  # of the base
        "runtime_config",  # PEFT never restores it
    }
)

_NONE: tuple[object, ...] = (None,)
_EMPTY: tuple[object, ...] = (None, [], {})
_OFF: tuple[object, ...] = (None, False)

ACCEPTED: dict[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), '"LORA"'),
    "task_type": ((None, "CAUSAL_LM"), '"CAUSAL_LM" or null'),
    "bias": (("none",), '"none"'),
    "fan_in_fan_out": (_OFF, "false"),
    "use_dora": (_OFF, "false"),
    "lora_bias": (_OFF, "false"),
    "use_qalora": (_OFF, "false"),
    "modules_to_save": (_EMPTY, "null"),
    "trainable_token_indices": (_EMPTY, "null"),
    "target_parameters": (_EMPTY, "null"),
    "layer_replication": (_EMPTY, "null"),
    "alora_invocation_tokens": (_NONE, "null"),
    "megatron_config": (_NONE, "null"),
    "velora_config": (_NONE, "null"),
    "monteclora_config": (_NONE, "null"),
    "arrow_config": (_NONE, "null"),
    "kasa_config": (_NONE, "null"),
    "use_bdlora": (_OFF, "null"),
}
"""Field → the values that change nothing, and how to say them."""

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights alone; the others train on a base that they have changed."""


def refuse_unsupported(config: Mapping[str, object]) -> None:
    """Raise UnsupportedField for the first field whose value is not served, with what would be."""
    for name, value in config.items():
        if name in ACCEPTED:
            values, spelled = ACCEPTED[name]
            if not _is_one_of(value, values):
                raise _unsupported(name, value, spelled)
        elif name == "init_lora_weights":
            harmless = isinstance(value, str) and value.lower() in HARMLESS_INITS
            if not harmless and not _is_one_of(value, (None, True, False)):
                raise _unsupported(name, value, f"true, false, {', '.join(map(repr, HARMLESS_INITS))}")
        elif name not in SERVED and name not in WITHOUT_EFFECT and not _is_one_of(value, (None, False, "", [], {})):
            raise _unsupported(name, value, "null, since this server does not know the field")


def _is_one_of(value: object, accepted: tuple[object, ...]) -> bool:
    return any(type(value) is type(candidate) and value == candidate for candidate in accepted)


def _unsupported(name: str, value: object, accepted: str) -> UnsupportedField:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    name = name[:80] if name.isascii() and name.isprintable() else ascii(name)[:80]
    return UnsupportedField(f"{name} is {shown}, this server takes {accepted}", name)
