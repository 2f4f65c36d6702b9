"""Named tensors → the pairs A [r, K], B [N, r] of each adapted linear, strictly.

    [base_model.model.]model.layers.{i}.{self_attn|mlp}.{site}.lora_{A|B}[.default].weight

Every tensor of the file is used, every linear that the config adapts is there, shapes agree with the config's ranks
and the base, and all values are finite; anything else is an error that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lorry.adapters.errors import MalformedAdapter, WrongBase
from lorry.adapters.layout import Linear, ModelLayout
from lorry.adapters.spec import AdapterSpec
from lorry.adapters.tensor_file import is_finite

Pairs = dict[Linear, tuple[Tensor, Tensor]]

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>model\..+?)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_pairs(tensors: Mapping[str, Tensor], spec: AdapterSpec, layout: ModelLayout) -> Pairs:
    """{(layer, site): (A [r, K], B [N, r])} in the file's dtypes; raises MalformedAdapter or WrongBase."""
    halves: dict[tuple[Linear, str], tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        linear, half = _parse(name, layout, spec)
        if (linear, half) in halves:
            raise MalformedAdapter(f"{name} and {halves[linear, half][0]} are the same tensor", name)
        halves[linear, half] = name, tensor
    adapted = spec.adapted_linears(layout)
    meant = set(adapted)
    for (linear, _), (name, _) in halves.items():
        if linear not in meant:
            raise MalformedAdapter(f"{name} belongs to a module that target_modules does not mean", name)
    pairs: Pairs = {}
    for linear in adapted:
        path = layout.module_path(*linear)
        for half in "AB":
            if (linear, half) not in halves:
                missing = f"{path}.lora_{half}"
                raise MalformedAdapter(f"{missing} is missing, target_modules means {path}", missing)
        (name_a, a), (name_b, b) = halves[linear, "A"], halves[linear, "B"]
        in_features, out_features = layout.sites[linear[1]]
        rank = spec.rank_of(path)
        _check(name_a, a, (rank, in_features), rank_axis=0, spec=spec)
        _check(name_b, b, (out_features, rank), rank_axis=1, spec=spec)
        pairs[linear] = a, b
    if not pairs:
        raise MalformedAdapter("target_modules means no linear of this base", "target_modules")
    return pairs


def _parse(name: str, layout: ModelLayout, spec: AdapterSpec) -> tuple[Linear, str]:
    match = _KEY.fullmatch(name)
    linear = layout.parse(match["path"]) if match else None
    if match is None or linear is None or linear[1] not in layout.sites:
        raise MalformedAdapter(f"no rule uses the tensor {name[:200]!r}", name[:200])
    if linear[0] >= layout.layers:
        raise WrongBase(
            f"{name} is of layer {linear[0]}, this base has {layout.layers} layers{_trained_on(spec)}", name
        )
    return linear, match["half"]


def _check(name: str, tensor: Tensor, shape: tuple[int, int], rank_axis: int, spec: AdapterSpec) -> None:
    actual = tuple(tensor.shape)
    if len(actual) != 2 or actual[rank_axis] != shape[rank_axis]:
        raise MalformedAdapter(f"{name} has shape {list(actual)}, the config's rank asks for {list(shape)}", name)
    if actual != shape:
        raise WrongBase(f"{name} has shape {list(actual)}, this base needs {list(shape)}{_trained_on(spec)}", name)
    if not is_finite(tensor):
        raise MalformedAdapter(f"{name} holds NaN or infinity", name)


def _trained_on(spec: AdapterSpec) -> str:
    """Names the base by its hub id; a folder of the trainer's machine says nothing to a client."""
    return f"; the adapter names {spec.base} as its base" if _HUB_ID.fullmatch(spec.base) else ""
