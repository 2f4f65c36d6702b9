"""adapter_config.json → AdapterSpec: the mathematics that PEFT gives each linear, or a refusal by the field's name.

    s = α / r        (LoRA, arXiv:2106.09685)
    s = α / √r       (rsLoRA, arXiv:2312.03732)

with r and α of the first matching pattern, else the config's own. What the other methods compute, `methods.py` says;
an activated LoRA (aLoRA, arXiv:2504.12397) acts from its invocation tokens on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorry.adapters.errors import AdapterError, MalformedAdapter, UnsupportedField
from lorry.adapters.layout import ENDS, MAX_RANK, Linear, ModelLayout
from lorry.adapters.reading.fields import FACTOR_INITS, refuse_beside_alora, refuse_unsupported
from lorry.adapters.reading.matching import Matcher
from lorry.adapters.reading.strict_json import parse_object
from lorry.kernels.lora import END_SITES

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_INVOCATION_TOKENS = 1024

_FLOAT32_MAX = 3.4028234e38


@dataclass(frozen=True)
class AdapterSpec:
    """What a config says, checked. Patterns are in the file's order; `base` is only for messages.

    bias: "none", "all" or "lora_only". qalora_group_size: None without QA-LoRA. init: of `fields.FACTOR_INITS`, or "".
    modules_to_save: names; token_indices: of trainable_token_indices, (name of a module, token ids). What these and
    target_modules mean in a model, `targets.py` says.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    base: str = ""
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    qalora_group_size: int | None = None
    init: str = ""
    invocation_tokens: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ensure_weight_tying: bool = False
    loftq: bool = False
    _matcher: Matcher = field(default_factory=Matcher, compare=False, repr=False)

    @classmethod
    def from_bytes(cls, data: bytes) -> AdapterSpec:
        """Parse the content of adapter_config.json; raises MalformedAdapter or UnsupportedField."""
        return cls.from_json(parse_object(data, CONFIG_NAME, MAX_CONFIG_BYTES))

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> AdapterSpec:
        """Check every field; raises MalformedAdapter or UnsupportedField that names one."""
        if "peft_type" not in config:
            raise MalformedAdapter('peft_type is missing, "LORA" is expected', "peft_type")
        refuse_unsupported({"peft_type": config["peft_type"]})
        refuse_unsupported(config)
        for name in ("r", "target_modules"):
            if name not in config:
                raise MalformedAdapter(f"{name} is missing", name)
        targets = _modules(config["target_modules"], "target_modules")
        if not targets:
            raise UnsupportedField("target_modules names nothing, name the linears that are adapted", "target_modules")
        layers = _layers(config.get("layers_to_transform"))
        layers_pattern = _modules(config.get("layers_pattern"), "layers_pattern")
        if isinstance(layers_pattern, str):
            layers_pattern = (layers_pattern,) if layers_pattern else ()
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(targets, str) and config.get(name) is not None:
                raise MalformedAdapter(f"{name} needs target_modules to be a list, it is a string", name)
        if layers_pattern and layers is None:
            raise MalformedAdapter("layers_pattern needs layers_to_transform", "layers_pattern")
        invocation_tokens = _invocation_tokens(config.get("alora_invocation_tokens"))
        if invocation_tokens:
            refuse_beside_alora(config)
        base, init = config.get("base_model_name_or_path"), config.get("init_lora_weights")
        return cls(
            rank=_rank(config["r"], "r"),
            alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
            use_rslora=_bool(config.get("use_rslora", False), "use_rslora"),
            rank_pattern=tuple((k, _rank(v, "rank_pattern")) for k, v in _pairs(config, "rank_pattern")),
            alpha_pattern=tuple((k, _alpha(v, "alpha_pattern")) for k, v in _pairs(config, "alpha_pattern")),
            target_modules=targets,
            exclude_modules=_modules(config.get("exclude_modules"), "exclude_modules"),
            layers_to_transform=layers or None,
            layers_pattern=layers_pattern,
            base=base[:200] if isinstance(base, str) else "",
            use_dora=_bool(config.get("use_dora") or False, "use_dora"),
            bias=_choice(config.get("bias", "none"), "bias", ("none", "all", "lora_only")),
            lora_bias=_bool(config.get("lora_bias") or False, "lora_bias"),
            qalora_group_size=_group_size(config),
            init=init if isinstance(init, str) and init in FACTOR_INITS else "",
            invocation_tokens=invocation_tokens,
            modules_to_save=_names(config.get("modules_to_save"), "modules_to_save"),
            token_indices=_token_indices(config.get("trainable_token_indices")),
            ensure_weight_tying=_bool(config.get("ensure_weight_tying") or False, "ensure_weight_tying"),
            loftq=init == "loftq",
        )._checked()

    def _checked(self) -> AdapterSpec:
        """Itself; raises UnsupportedField for methods that PEFT does not combine either."""
        for other, name in ((self.lora_bias, "lora_bias"), (self.qalora_group_size is not None, "use_qalora")):
            if self.use_dora and other:
                raise UnsupportedField(f"{name} and use_dora do not go together", name)
        if self.invocation_tokens and self.init:  # what it subtracts would act on the tokens before as well
            raise UnsupportedField(
                f"init_lora_weights {self.init!r} and alora_invocation_tokens do not go together", "init_lora_weights"
            )
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        used = {
            "rslora" if self.use_rslora else "lora": True,
            "dora": self.use_dora,
            "bias": self.bias != "none",
            "lora_bias": self.lora_bias,
            "qalora": self.qalora_group_size is not None,
            self.init: bool(self.init),
            "alora": bool(self.invocation_tokens),
            "modules_to_save": bool(self.modules_to_save),
            "trainable_tokens": bool(self.token_indices),
        }
        return tuple(name for name, is_used in used.items() if is_used)

    def rank_of(self, path: str) -> int:
        """r of the module at `path`."""
        found = self._matcher.pattern_value(self.rank_pattern, path, "rank_pattern")
        return self.rank if found is None else int(found)

    def scaling_of(self, path: str) -> float:
        """s of the module at `path`; raises MalformedAdapter when float32 cannot hold it."""
        found = self._matcher.pattern_value(self.alpha_pattern, path, "alpha_pattern")
        alpha = self.alpha if found is None else found
        rank = self.rank_of(path)
        scaling = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        if abs(scaling) > _FLOAT32_MAX:
            raise MalformedAdapter(f"lora_alpha: the scaling of {path} is {scaling:g}, too large", "lora_alpha")
        return scaling

    def adapts(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`, which it does not where modules_to_save has its whole name."""
        if self.exclude_modules and self._matcher.names(self.exclude_modules, path, "exclude_modules"):
            return False
        for name in self.modules_to_save:
            if self._matcher.match(rf"(^|.*\.){name}($|\..*)", path, "modules_to_save"):
                return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                linear = ModelLayout.parse(path)
                return linear is not None and linear[0] != ENDS
            return self._matcher.names(self.target_modules, path, "target_modules")
        if path in self.target_modules:
            return True
        if not self._matcher.names(self.target_modules, path, "target_modules"):
            return False
        if self.layers_to_transform is None:
            return True
        return self._matcher.layer_index(self.layers_pattern, path) in self.layers_to_transform

    def names_an_end(self, modules: str | tuple[str, ...]) -> bool:
        """Whether PEFT takes these names, or this expression, for the embedding's or the head's when it ties them."""
        if isinstance(modules, str):
            return any(self._matcher.match(modules, site, "target_modules", whole=True) for site in END_SITES)
        return any(name.rpartition(".")[2] in END_SITES for name in modules)

    def adapted_linears(self, layout: ModelLayout) -> list[Linear]:
        """Every linear of `layout` that target_modules means, the embedding and the head behind those of the layers."""
        linears = (*layout.linears(), *((ENDS, site) for site in layout.ends))
        return [linear for linear in linears if self.adapts(layout.module_path(*linear))]


def _wrong(name: str, value: object, expected: str, error: type[AdapterError] = MalformedAdapter) -> AdapterError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return error(f"{name} is {shown}, {expected} is expected", name)


def _bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _choice(value: object, name: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong(name, value, " or ".join(map(repr, choices)))
    return value


def _group_size(config: Mapping[str, object]) -> int | None:
    """QA-LoRA's; 16 is PEFT's default."""
    if not _bool(config.get("use_qalora") or False, "use_qalora"):
        return None
    value = config.get("qalora_group_size", 16)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong("qalora_group_size", value, "a whole number from 1")
    return value


def _rank(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, value, f"a whole number from 1 to {MAX_RANK}")
    if value > MAX_RANK:
        raise _wrong(name, value, f"a rank of at most {MAX_RANK}", UnsupportedField)
    return value


def _alpha(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a finite number")
    try:
        alpha = float(value)
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        raise _wrong(name, value, "a finite number")
    return alpha


def _pairs(config: Mapping[str, object], name: str) -> list[tuple[str, object]]:
    value = config.get(name)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return list(value.items())


def _modules(value: object, name: str) -> str | tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, value, "a string or a list of strings")
    return tuple(value)


def _names(value: object, name: str) -> tuple[str, ...]:
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
        raise _wrong(name, value, "a list of names")
    return tuple(value or ())


def _token_indices(value: object) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A list means the embedding."""
    name = "trainable_token_indices"
    by_module = value if isinstance(value, dict) else {"embed_tokens": value or []}
    found = []
    for module, ids in by_module.items():
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise _wrong(name, ids, "a list of token ids, or an object of such lists by the name of a module,")
        if ids:
            found.append((str(module), tuple(ids)))
    return tuple(found)


def _layers(value: object) -> frozenset[int] | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise _wrong("layers_to_transform", value, "a whole number or a list of them")
    return frozenset(values)


def _invocation_tokens(value: object) -> tuple[int, ...]:
    name = "alora_invocation_tokens"
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        raise _wrong(name, value, "a list of token ids")
    if len(value) > MAX_INVOCATION_TOKENS:
        raise UnsupportedField(
            f"{name} has {len(value)} token ids, this server takes at most {MAX_INVOCATION_TOKENS}", name
        )
    return tuple(value)
