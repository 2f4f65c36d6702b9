"""Named tensors → what the file has of each linear, strictly.

    [base_model.model.]<path of the module>. and one of

    lora_A[.default].weight, lora_embedding_A[.default]     A [r, K], with QA-LoRA [r, K/g]
    lora_B[.default].weight, lora_embedding_B[.default]     B [N, r]
    lora_B[.default].bias                                   b_B [N], with lora_bias
    lora_magnitude_vector[.default][.weight]                m [N], with use_dora
    [base_layer.]bias                                       b' [N], with bias = all or, on adapted linears, lora_only
    [modules_to_save.[default.]]weight, and bias            W' [N, K], of the embedding [V, H], and b' [N]
    token_adapter.trainable_tokens_delta[.default]          E'[t] [n, H] of n tokens t
    [token_adapter.]base_layer.weight, weight,
    original_module.weight                                  of embedding and head: the base's own, beside the adapter's
    original_module.bias                                    the base's own, which nothing computes with, beside a W'

Every tensor of the file is used, every linear that the config means is there, shapes agree with the config's ranks
and the base, and all values are finite; anything else is an error that names the tensor. Only biases may be missing,
for PEFT has not always written them: then the base's own stay, in PEFT too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.adapters.errors import MalformedAdapter, WrongBase
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.adapters.pace import Rest, no_rest
from lorry.adapters.reading.names import kind_of, unwrapped
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.targets import EMBEDDING, HEAD, Targets, targets_of
from lorry.adapters.reading.tensor_file import is_finite

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>lm_head|model\..+?)\."
    r"(?:(?P<a>lora_A(?:\.default)?\.weight)|(?P<b>lora_B(?:\.default)?\.weight)|(?P<b_bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<embedding_a>lora_embedding_A(?:\.default)?)|(?P<embedding_b>lora_embedding_B(?:\.default)?)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
    r"|(?P<weight>(?:modules_to_save\.(?:default\.)?)?weight)"
    r"|(?P<saved>(?:(?:token_adapter\.)?base_layer|original_module)\.weight)|(?P<unused>original_module\.bias)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta(?:\.default)?)"
    r"|(?P<bias>(?:base_layer\.|modules_to_save\.(?:default\.)?)?bias))"
)
_SHOWN = {
    "a": "lora_A",
    "b": "lora_B",
    "b_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "weight": "weight",
    "rows": "token_adapter.trainable_tokens_delta",
    "bias": "bias",
}
_TIED = {"a": "b", "b": "a", "weight": "weight", "rows": "rows"}  # what the head has of the embedding's
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Parts = dict[str, tuple[str, Tensor]]
"""What a file has of one linear: part → (name of the tensor, tensor)."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearTensors:
    """What a file has of one linear, in its dtypes; shapes as above. in_features: K. a and b are there or not, both.

    row_ids: the tokens of `rows`. saved: the base's own matrix [N, K], of the embedding [V, H], as the trainer had it.
    """

    in_features: int
    a: Tensor | None = None
    b: Tensor | None = None
    b_bias: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None
    row_ids: tuple[int, ...] = ()
    saved: Tensor | None = None

    @property
    def empty(self) -> bool:
        tensors = (self.a, self.b, self.b_bias, self.magnitude, self.bias, self.weight, self.rows, self.saved)
        return all(tensor is None for tensor in tensors)


def read_linears(
    tensors: Mapping[str, Tensor], spec: AdapterSpec, layout: ModelLayout, rest: Rest = no_rest
) -> dict[Linear, LinearTensors]:
    """The linears of a file; raises MalformedAdapter, UnsupportedField or WrongBase. rest: called between two."""
    targets = targets_of(spec, layout)
    found: dict[Linear, Parts] = {}
    for name, tensor in tensors.items():
        rest()
        linear, part = _parse(name, layout, spec)
        if part == "weight" and linear[0] == ENDS and linear not in targets.own:
            part = "saved"
        parts = found.setdefault(linear, {})
        if part in parts:
            if _is_again((name, tensor), parts[part]):
                continue
            raise MalformedAdapter(f"{name} and {parts[part][0]} are the same tensor", name)
        parts[part] = name, tensor
    wanted = _wanted(targets, spec)
    if not targets.factors:
        raise MalformedAdapter("target_modules means no linear of this base", "target_modules")
    _check_meant(found, wanted, targets, spec, layout)
    if targets.tied:
        _tie(found)
    linears = {}
    for linear in dict.fromkeys((*wanted, *found)):
        parts = found.get(linear, {})
        for part in _SHOWN:
            if part in wanted.get(linear, ()) and part not in parts:
                path = layout.module_path(*linear)
                missing = f"{path}.{_SHOWN[part]}"
                raise MalformedAdapter(f"{missing} is missing, the config means {path}", missing)
        if parts:
            linears[linear] = _checked(parts, linear, targets, spec, layout)
            rest()
    return linears


def _is_again(one: tuple[str, Tensor], other: tuple[str, Tensor]) -> bool:
    """Whether PEFT has saved a module's own tensor by its inner name too, with bias "all" or save_embedding_layers."""
    inner = [".modules_to_save." in name for name, _ in (one, other)]
    return inner[0] is not inner[1] and one[1].dtype == other[1].dtype and torch.equal(one[1], other[1])


def _wanted(targets: Targets, spec: AdapterSpec) -> dict[Linear, frozenset[str]]:
    """The parts that every linear must have that the config means."""
    of_factors = {"a": True, "b": True, "b_bias": spec.lora_bias, "magnitude": spec.use_dora}
    wanted = dict.fromkeys(targets.factors, frozenset(part for part, is_wanted in of_factors.items() if is_wanted))
    wanted |= dict.fromkeys(targets.own, frozenset({"weight"}))
    return wanted | dict.fromkeys(targets.rows or (), frozenset({"rows"}))


def _check_meant(
    found: Mapping[Linear, Parts],
    wanted: Mapping[Linear, frozenset[str]],
    targets: Targets,
    spec: AdapterSpec,
    layout: ModelLayout,
) -> None:
    """Raises MalformedAdapter for a tensor that the config does not mean."""
    biased = {*targets.own, *(() if spec.bias == "none" else targets.factors)}
    if spec.bias == "all":
        biased |= set(layout.linears())
    for linear, parts in found.items():
        meant = linear in wanted or linear in biased
        for part, (name, _) in parts.items():
            is_base = (part == "saved" and linear[0] == ENDS) or (part == "unused" and linear in targets.own)
            if not (part in wanted.get(linear, ()) or (part == "bias" and linear in biased) or is_base):
                raise MalformedAdapter(f"{name} {_unmeant(part, meant)}", name)


def _unmeant(part: str, meant: bool) -> str:
    match part:
        case "bias" if not meant:
            return "belongs to a module whose bias the config does not mean"
        case "bias":
            return 'needs bias to be "all" or "lora_only"'
        case "b_bias" if meant:
            return "needs lora_bias to be true"
        case "magnitude" if meant:
            return "needs use_dora to be true"
        case "weight" | "saved" | "unused":
            return "belongs to a module that modules_to_save does not mean"
        case "rows":
            return "belongs to a module that trainable_token_indices does not mean"
        case _:
            return "belongs to a module that target_modules does not mean"


def _tie(found: dict[Linear, Parts]) -> None:
    """Give the head what the embedding has. A file may have it of both; raises MalformedAdapter where they differ."""
    embedding, head = (found.setdefault(end, {}) for end in (EMBEDDING, HEAD))
    for part, of_head in _TIED.items():
        if part not in embedding:
            continue
        name, tensor = embedding[part]
        followed = tensor.T if of_head != part and tensor.dim() == 2 else tensor
        own = head.setdefault(of_head, (name, followed))
        if own[1].shape != followed.shape or not torch.equal(own[1], followed):
            raise MalformedAdapter(f"{own[0]} is not what {name} is, which it is tied to", own[0])


def _parse(name: str, layout: ModelLayout, spec: AdapterSpec) -> tuple[Linear, str]:
    match = _KEY.fullmatch(unwrapped(name))
    linear = layout.parse(match["path"]) if match else None
    part = str(match.lastgroup) if match else ""
    if linear == EMBEDDING:
        part = {"embedding_a": "a", "embedding_b": "b", "a": "", "b": "", "b_bias": ""}.get(part, part)
    if linear is None or part in ("", "embedding_a", "embedding_b") or linear[1] not in layout.sites | layout.ends:
        raise MalformedAdapter(f"no rule uses the tensor {name[:200]!r}{kind_of(name)}", name[:200])
    if linear[0] >= layout.layers:
        raise WrongBase(
            f"{name} is of layer {linear[0]}, this base has {layout.layers} layers{_trained_on(spec)}", name
        )
    return linear, part


def _checked(
    parts: Mapping[str, tuple[str, Tensor]], linear: Linear, targets: Targets, spec: AdapterSpec, layout: ModelLayout
) -> LinearTensors:
    in_features, out_features = layout.shape(linear[1])
    rank = spec.rank_of(layout.module_path(*targets.owner(linear)))
    inputs = in_features
    if spec.qalora_group_size is not None and "a" in parts and parts["a"][1].shape[-1:] != (in_features,):
        inputs = in_features // spec.qalora_group_size  # PEFT itself pools over GPTQ bases only
    whole = (in_features, out_features) if linear == EMBEDDING else (out_features, in_features)
    row_ids = (targets.rows or {}).get(linear, ())
    shapes = {
        "a": (rank, inputs),
        "b": (out_features, rank),
        "weight": whole,
        "saved": whole,
        "rows": (len(row_ids), whole[1]),
    }
    for part, (name, tensor) in parts.items():
        of_config = {"a": 0, "b": 1, "rows": 0}.get(part)
        _check(name, tensor, shapes.get(part, (out_features,)), of_config, spec)
    used = {part: tensor for part, (_, tensor) in parts.items() if part != "unused"}
    return LinearTensors(in_features, **used, row_ids=row_ids)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], of_config: int | None, spec: AdapterSpec) -> None:
    """of_config: the axis whose size the config says; the others are the base's."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or (of_config is not None and actual[of_config] != shape[of_config]):
        raise MalformedAdapter(f"{name} has shape {list(actual)}, the config asks for {list(shape)}", name)
    if actual != shape:
        raise WrongBase(f"{name} has shape {list(actual)}, this base needs {list(shape)}{_trained_on(spec)}", name)
    if not is_finite(tensor):
        raise MalformedAdapter(f"{name} holds NaN or infinity", name)


def _trained_on(spec: AdapterSpec) -> str:
    """Names the base by its hub id; a folder of the trainer's machine says nothing to a client."""
    return f"; the adapter names {spec.base} as its base" if _HUB_ID.fullmatch(spec.base) else ""
