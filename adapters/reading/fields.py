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
        "use_dora",
        "bias",
        "lora_bias",
        "use_qalora",
        "qalora_group_size",
        "alora_invocation_tokens",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
    }
)

WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",  # read when init_lora_weights is "corda"
        "eva_config",
        "fan_in_fan_out",  # PEFT turns it off for every nn.Linear, and there are no others here
        "inference_mode",
        "loftq_config",  # looked at when init_lora_weights is "loftq"
        "lora_dropout",  # training only
        "lora_ga_config",  # read when init_lora_weights is "lora_ga"
        "megatron_core",  # read when megatron_config is set
        "peft_version",
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
    "target_parameters": (_EMPTY, "null"),
    "layer_replication": (_EMPTY, "null"),
    "megatron_config": (_NONE, "null"),
    "velora_config": (_NONE, "null"),
    "monteclora_config": (_NONE, "null"),
    "arrow_config": (_NONE, "null"),
    "kasa_config": (_NONE, "null"),
    "use_bdlora": (_OFF, "null"),
}
"""Field → the values that change nothing, and how to say them."""

WITH_ALORA: dict[str, tuple[tuple[object, ...], str]] = {
    "bias": (("none",), '"none"'),
    "use_dora": (_OFF, "false"),
    "use_qalora": (_OFF, "false"),
    "modules_to_save": (_EMPTY, "null"),
    "trainable_token_indices": (_EMPTY, "null"),
}
"""Field → what it must be beside alora_invocation_tokens: others would change the tokens before these, or PEFT has no
such form."""

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights alone; the others train on a base that they have changed."""

FACTOR_INITS = ("pissa", "olora")
"""Those whose change can be computed again from the base."""


def refuse_unsupported(config: Mapping[str, object]) -> None:
    """Raise UnsupportedField for the first field whose value is not served, with what would be."""
    for name, value in config.items():
        if name in ACCEPTED:
            values, spelled = ACCEPTED[name]
            if not _is_one_of(value, values):
                raise _unsupported(name, value, spelled)
        elif name == "init_lora_weights":
            _check_init(value, config.get("loftq_config"))
        elif name not in SERVED and name not in WITHOUT_EFFECT and not _is_one_of(value, (None, False, "", [], {})):
            raise _unsupported(name, value, "null, since this server does not know the field")


def _check_init(value: object, loftq: object) -> None:
    if _is_one_of(value, (None, True, False)):
        return
    if isinstance(value, str) and (value.lower() in HARMLESS_INITS or value in FACTOR_INITS):
        return
    iterations = loftq.get("loftq_iter", 1) if isinstance(loftq, dict) else 1
    if value == "loftq" and iterations == 1:  # it trains on NF4 of the weights as they are
        return
    names = ", ".join(map(repr, (*HARMLESS_INITS, *FACTOR_INITS)))
    raise _unsupported(
        "init_lora_weights",
        value,
        f"true, false, {names} and 'loftq' of one iteration; others train on a base that cannot be found again: let"
        " PEFT save them with path_initial_model_for_weight_conversion",
    )


def refuse_beside_alora(config: Mapping[str, object]) -> None:
    """Raise UnsupportedField for the first field that an activated LoRA cannot have."""
    for name, (values, spelled) in WITH_ALORA.items():
        if name in config and not _is_one_of(config[name], values):
            raise _unsupported(name, config[name], f"{spelled} beside alora_invocation_tokens")


def _is_one_of(value: object, accepted: tuple[object, ...]) -> bool:
    return any(type(value) is type(candidate) and value == candidate for candidate in accepted)


def _unsupported(name: str, value: object, accepted: str) -> UnsupportedField:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    name = name[:80]
    return UnsupportedField(f"{name} is {shown}, this server takes {accepted}", name)
