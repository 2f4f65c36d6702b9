"""Named tensors → what the file has of each linear, strictly.

    [base_model.model.]model.layers.{i}.{self_attn|mlp}.{site}. and one of

    lora_A[.default].weight                      A [r, K], with QA-LoRA [r, K/g]
    lora_B[.default].weight                      B [N, r]
    lora_B[.default].bias                        b_B [N], with lora_bias
    lora_magnitude_vector[.default][.weight]     m [N], with use_dora
    [base_layer.]bias                            b' [N], with bias = all or, on adapted linears, lora_only

Every tensor of the file is used, every linear that the config adapts is there, shapes agree with the config's ranks
and the base, and all values are finite; anything else is an error that names the tensor. Only biases may be missing,
for PEFT has not always written them: then the base's own stay, in PEFT too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorry.adapters.errors import MalformedAdapter, WrongBase
from lorry.adapters.layout import Linear, ModelLayout
from lorry.adapters.pace import Rest, no_rest
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.tensor_file import is_finite

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>model\..+?)\."
    r"(?:(?P<a>lora_A(?:\.default)?\.weight)|(?P<b>lora_B(?:\.default)?\.weight)|(?P<b_bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)|(?P<bias>(?:base_layer\.)?bias))"
)
_SHOWN = {
    "a": "lora_A",
    "b": "lora_B",
    "b_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "bias": "bias",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class LinearTensors:
    """What a file has of one linear, in its dtypes; shapes as above. in_features: K. a and b are there or not, both."""

    in_features: int
    a: Tensor | None = None
    b: Tensor | None = None
    b_bias: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None


def read_linears(
    tensors: Mapping[str, Tensor], spec: AdapterSpec, layout: ModelLayout, rest: Rest = no_rest
) -> dict[Linear, LinearTensors]:
    """The linears of a file; raises MalformedAdapter or WrongBase. rest: called between two of them."""
    found: dict[Linear, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        rest()
        linear, part = _parse(name, layout, spec)
        parts = found.setdefault(linear, {})
        if part in parts:
            raise MalformedAdapter(f"{name} and {parts[part][0]} are the same tensor", name)
        parts[part] = name, tensor
    adapted = spec.adapted_linears(layout)
    if not adapted:
        raise MalformedAdapter("target_modules means no linear of this base", "target_modules")
    meant = {linear: _wanted(spec) for linear in adapted}
    if spec.bias == "all":
        meant = dict.fromkeys(layout.linears(), frozenset[str]()) | meant
    for linear, parts in found.items():
        allowed = {*meant.get(linear, ()), *(["bias"] if linear in meant and spec.bias != "none" else [])}
        for part, (name, _) in parts.items():
            if part not in allowed:
                raise MalformedAdapter(f"{name} {_unmeant(part, linear in meant)}", name)
    linears = {}
    for linear, wanted in meant.items():
        parts = found.get(linear, {})
        for part in _SHOWN:
            if part in wanted and part not in parts:
                path = layout.module_path(*linear)
                missing = f"{path}.{_SHOWN[part]}"
                raise MalformedAdapter(f"{missing} is missing, target_modules means {path}", missing)
        if parts:
            linears[linear] = _checked(parts, linear, spec, layout)
            rest()
    return linears


def _wanted(spec: AdapterSpec) -> frozenset[str]:
    """The parts that every adapted linear must have."""
    wanted = {"a": True, "b": True, "b_bias": spec.lora_bias, "magnitude": spec.use_dora}
    return frozenset(part for part, is_wanted in wanted.items() if is_wanted)


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
        case _:
            return "belongs to a module that target_modules does not mean"


def _parse(name: str, layout: ModelLayout, spec: AdapterSpec) -> tuple[Linear, str]:
    match = _KEY.fullmatch(name)
    linear = layout.parse(match["path"]) if match else None
    if match is None or linear is None or linear[1] not in layout.sites:
        raise MalformedAdapter(f"no rule uses the tensor {name[:200]!r}", name[:200])
    if linear[0] >= layout.layers:
        raise WrongBase(
            f"{name} is of layer {linear[0]}, this base has {layout.layers} layers{_trained_on(spec)}", name
        )
    return linear, str(match.lastgroup)


def _checked(
    parts: Mapping[str, tuple[str, Tensor]], linear: Linear, spec: AdapterSpec, layout: ModelLayout
) -> LinearTensors:
    in_features, out_features = layout.sites[linear[1]]
    rank = spec.rank_of(layout.module_path(*linear))
    inputs = in_features
    if spec.qalora_group_size is not None and "a" in parts and parts["a"][1].shape[-1:] != (in_features,):
        inputs = in_features // spec.qalora_group_size  # PEFT itself pools over GPTQ bases only
    shapes = {"a": (rank, inputs), "b": (out_features, rank)}
    for part, (name, tensor) in parts.items():
        _check(name, tensor, shapes.get(part, (out_features,)), spec)
    return LinearTensors(in_features, **{part: tensor for part, (_, tensor) in parts.items()})


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], spec: AdapterSpec) -> None:
    actual = tuple(tensor.shape)
    rank_axis = 1 if ".lora_B" in name else 0
    if len(actual) != len(shape) or (len(shape) == 2 and actual[rank_axis] != shape[rank_axis]):
        raise MalformedAdapter(f"{name} has shape {list(actual)}, the config asks for {list(shape)}", name)
    if actual != shape:
        raise WrongBase(f"{name} has shape {list(actual)}, this base needs {list(shape)}{_trained_on(spec)}", name)
    if not is_finite(tensor):
        raise MalformedAdapter(f"{name} holds NaN or infinity", name)


def _trained_on(spec: AdapterSpec) -> str:
    """Names the base by its hub id; a folder of the trainer's machine says nothing to a client."""
    return f"; the adapter names {spec.base} as its base" if _HUB_ID.fullmatch(spec.base) else ""
