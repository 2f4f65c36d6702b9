"""A parity probe: what the pages of an adapter add to an output, against PEFT's mathematics on the file's own tensors.

    served     u = y - y0,  y = y0 and then lora_add through the pool's pages, in float32
    reference  u of `reference_update` in float64, from tensors that safetensors itself has read

for a few of the adapted linears and random x. The two share neither the reader of the file nor the formulas. Matrices
and rows of the adapter's own are not probed: pages hold them as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.device.pool import PagePool
from lorry.adapters.errors import PoolTooSmall
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.matching import Matcher
from lorry.adapters.reading.names import unwrapped
from lorry.kernels.lora import END_SITES, SITES, Segments, Site, lora_add, lora_embed

ROWS = 5
MOST_LINEARS = 5
REFERENCED = frozenset(
    {"lora", "rslora", "dora", "bias", "lora_bias", "qalora", "alora", "modules_to_save", "trainable_tokens"}
)


@dataclass(frozen=True)
class Probe:
    """Errors of the served update: the largest over the reference's largest value, RMS over RMS."""

    linears: tuple[str, ...]
    max_error: float
    rms_error: float
    within: bool


def probe(
    adapter: CanonicalAdapter,
    config: Mapping[str, object],
    weights: Sequence[bytes],
    layout: ModelLayout,
    base: BaseWeights,
) -> Probe | None:
    """The probe of an adapter that was loaded from these contents; None for methods that are not REFERENCED.

    Its pages are not of 8 bits, whose error has no bound that holds for all adapters. within: errors are no larger than
    rounding A, B and the vectors to the pages' dtype explains.
    """
    tensors = {unwrapped(name): tensor for part in weights for name, tensor in safetensors.torch.load(part).items()}
    probed = [linear for linear in adapter.linears if _is_update(_parts(tensors, layout.module_path(*linear)))]
    if not REFERENCED.issuperset(adapter.methods) or not probed:
        return None
    every = sorted(probed, key=lambda linear: (linear[0], (*SITES, *END_SITES).index(linear[1])))
    stride = max(1, (len(every) - 1) / (MOST_LINEARS - 1))
    chosen = list(dict.fromkeys(every[round(step * stride)] for step in range(min(MOST_LINEARS, len(every)))))
    pool, slot = _resident(adapter, chosen, layout)
    generator = torch.Generator().manual_seed(0)
    served, reference = [], []
    for linear in chosen:
        layer, site = linear
        in_features, out_features = layout.shape(site)
        token_ids = torch.randint(in_features, (ROWS,), generator=generator)
        one_hot = site == "embed_tokens"
        x = torch.randn(ROWS, in_features, generator=generator)
        if one_hot:
            x.zero_()[torch.arange(ROWS), token_ids] = 1
        path = layout.module_path(layer, site)
        before, after = reference_update(config, tensors, path, x.double(), linear, base)
        y0 = before.float()
        y = y0.clone()
        segments = Segments(torch.tensor([0, ROWS], dtype=torch.int32), _slots(slot), torch.ones(1, 1))
        pages = pool.pages if layer != ENDS else pool.pages.ends
        assert pages is not None
        if one_hot:
            lora_embed(y, token_ids, in_features, pages, segments)
        else:
            index = END_SITES.index(site) if layer == ENDS else SITES.index(site)
            lora_add(y, x, pages, max(layer, 0), (Site(index, 0, out_features),), segments)
        served.append((y.double() - y0).flatten())
        reference.append((after - before).flatten())
    ours, theirs = torch.cat(served), torch.cat(reference)
    largest = float(theirs.abs().max()) or 1.0
    rms = float(theirs.square().mean().sqrt()) or 1.0
    max_error = _finite(float((ours - theirs).abs().max()) / largest)
    rms_error = _finite(float((ours - theirs).square().mean().sqrt()) / rms)
    bound = max(torch.finfo(pool.dtype).eps, 1e-5)
    within = max_error <= 4 * bound and rms_error <= bound
    return Probe(tuple(layout.module_path(*linear) for linear in chosen), max_error, rms_error, within)


def _parts(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """What the file has of the module at `path`, by the rest of the names."""
    return {name.split(f"{path}.", 1)[1]: tensor for name, tensor in tensors.items() if f"{path}." in name}


def _is_update(parts: Mapping[str, Tensor]) -> bool:
    """Whether there are A and B, or a bias alone, and no matrix or row in place of the base's."""
    return any("lora_" in name for name in parts) or (bool(parts) and all(name.endswith("bias") for name in parts))


def _finite(error: float) -> float:
    """The largest number in the place of one that JSON cannot hold: numbers that float32 cannot hold were summed."""
    return error if math.isfinite(error) else sys.float_info.max


def reference_update(
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    path: str,
    x: Tensor,
    linear: Linear,
    base: BaseWeights,
) -> tuple[Tensor, Tensor]:
    """The outputs y0 and y [M, N] of the module at `path` for x [M, K], without and with the adapter, in float64.

    y0 is left at zero where the adapter's part does not depend on it.
    """
    own = _parts(tensors, path)
    a, b, b_bias, bias, magnitude = (
        next((each.double() for name, each in own.items() if name.startswith(start) and name.endswith(end)), None)
        for start, end in [
            (("lora_A", "lora_embedding_A"), ("weight", "_A", "default")),
            (("lora_B", "lora_embedding_B"), ("weight", "_B", "default")),
            (("lora_B",), ("bias",)),
            (("b",), ("bias",)),  # of the module itself, or of its base_layer
            (("lora_magnitude_vector",), ("",)),
        ]
    )
    out_features = next(tensor for tensor in (b, bias) if tensor is not None).shape[0]
    on_base = magnitude is not None or bias is not None
    weight = base.weight(linear).double() if on_base else None
    old = base.bias(linear) if on_base else None
    base_bias = x.new_zeros(out_features) if old is None else old.double()
    before = base_bias.expand(len(x), -1) if weight is None else x @ weight.T + base_bias
    update = x.new_zeros(x.shape[0], out_features)
    if a is not None and b is not None:
        rank = _of_pattern(config, "rank_pattern", "r", path)
        alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", path)
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        group = x.shape[1] // a.shape[1]
        pooled = x if group == 1 else x.reshape(len(x), -1, group).mean(-1) * a.shape[1]
        update = scaling * (pooled @ a.T @ b.T + (0 if b_bias is None else b_bias))
        if magnitude is not None and weight is not None:
            norm = (weight + scaling * b @ a).norm(dim=1)
            return before, magnitude / norm * (before - base_bias + update) + (base_bias if bias is None else bias)
    return before, before + update + (0 if bias is None else bias - base_bias)


def _of_pattern(config: Mapping[str, object], name: str, otherwise: str, path: str) -> float:
    """The value for `path` of the first key of a pattern that matches, else of the field `otherwise`."""
    pattern, found = config.get(name), config.get(otherwise, 8)
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        if Matcher().match(rf"(.*\.)?({key})$", path, name):
            found = value
            break
    assert isinstance(found, int | float)
    return float(found)


def _resident(adapter: CanonicalAdapter, chosen: list[Linear], layout: ModelLayout) -> tuple[PagePool, int]:
    """A pool that holds these linears of the adapter, and their slot."""
    few = adapter.with_linears({linear: adapter.linears[linear] for linear in chosen})
    dtype = few.linears[chosen[0]].pages.dtype
    capacity = 2 * few.nbytes
    while True:
        pool = PagePool(layout, capacity, dtype, max_slots=1)
        try:
            slot = pool.insert(few)
        except PoolTooSmall:
            capacity *= 2
            continue
        assert slot is not None
        return pool, slot


def _slots(slot: int) -> Tensor:
    return torch.tensor([[slot]], dtype=torch.int32)
