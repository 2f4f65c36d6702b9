"""The kernels together, as a decoder on a GPU calls them: two layers of decoding, against the references.

Shrink rides along with the base product of the same x, expand with the kernel that reads y: adapters cost no launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.kernels import nf4
from lorry.kernels.kv_store import kv_store_reference
from lorry.kernels.lora import (
    SITES,
    AdapterPages,
    LoraTerm,
    Routes,
    Segments,
    Site,
    fill_routes,
    lora_add_reference,
    make_routes,
)
from lorry.kernels.nf4 import NF4Weight
from lorry.kernels.paged_attention import paged_attention_reference
from lorry.kernels.rms_norm import rms_norm_reference
from lorry.kernels.rope import rope_reference
from lorry.kernels.silu_mul import silu_mul_reference
from lorry.kernels.triton import nf4_linear as gpu
from lorry.kernels.triton.kv_store import qkv_finish
from lorry.kernels.triton.nf4_fragments import Fragments
from lorry.kernels.triton.paged_attention import paged_attention
from lorry.kernels.triton.rms_norm import rms_norm
from lorry.kernels.triton.silu_mul import silu_mul
from lorry.server.model.placement import Placement

HIDDEN, HEADS, KV_HEADS, D, INTERMEDIATE, LAYERS, EPS = 192, 6, 2, 32, 320, 2, 1e-5
WIDTHS = {
    "q_proj": (HIDDEN, HEADS * D),
    "k_proj": (HIDDEN, KV_HEADS * D),
    "v_proj": (HIDDEN, KV_HEADS * D),
    "o_proj": (HEADS * D, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def sites_of(group: tuple[str, ...]) -> tuple[Site, ...]:
    starts = [sum(WIDTHS[name][1] for name in group[:place]) for place in range(len(group))]
    return tuple(Site(SITES.index(name), start, WIDTHS[name][1]) for name, start in zip(group, starts, strict=True))


@dataclass
class Step:
    """A batch of one token for each sequence, and the caches."""

    hidden: Tensor
    positions: Tensor
    slots: Tensor
    tables: Tensor
    cu_seqlens: Tensor
    kv_lens: Tensor
    cos_sin: Tensor
    caches: list[tuple[Tensor, Tensor]]


def adapters(device: str, slots: int) -> AdapterPages:
    """One page for every linear of every slot, side by side in the arena."""
    size = sum(16 * (k + n) for k, n in WIDTHS.values())
    arena = (torch.randn(slots * LAYERS * size) * 0.05).half().to(device)
    offsets = torch.full((slots, LAYERS, len(SITES), 2), -1, dtype=torch.int64)
    place = 0
    for slot in range(slots):
        for layer in range(LAYERS):
            for site, name in enumerate(SITES):
                offsets[slot, layer, site, 0] = place
                place += 16 * sum(WIDTHS[name])
    return AdapterPages(arena, offsets.to(device), torch.full((slots, LAYERS, len(SITES)), 0.7, device=device))


def on_gpu(
    step: Step, weights: list[list[Fragments]], norms: Tensor, pages: AdapterPages, routes: Routes | None
) -> Tensor:
    """What `Decoder` is to launch: 10 kernels a layer, adapters or not."""

    def term(layer: int, group: int) -> LoraTerm | None:
        sites = sites_of(GROUPS[group])
        return None if routes is None else LoraTerm(routes, pages, layer, sites, WIDTHS[GROUPS[group][0]][0])

    stream, added, last = step.hidden.clone(), torch.zeros_like(step.hidden), None
    for layer, (qkv, o, gate_up, down) in enumerate(weights):
        x = rms_norm(added, norms[0], EPS, stream, last)
        y = gpu.nf4_linear(x, qkv, shrink=term(layer, 0))
        q = qkv_finish(y, step.positions, step.cos_sin, *step.caches[layer], step.slots, lora=term(layer, 0))
        mixed = paged_attention(
            q, *step.caches[layer], step.tables, step.cu_seqlens, step.kv_lens, D**-0.5, max_query_len=1, sms=4
        ).flatten(1)
        added = gpu.nf4_linear(mixed, o, shrink=term(layer, 1))
        x = rms_norm(added, norms[1], EPS, stream, term(layer, 1))
        y = gpu.nf4_linear(x, gate_up, shrink=term(layer, 2))
        gated = silu_mul(y, term(layer, 2))
        added = gpu.nf4_linear(gated, down, shrink=term(layer, 3))
        last = term(layer, 3)
    return rms_norm(added, norms[0], EPS, stream, last)


def by_references(
    step: Step, parts: list[list[list[NF4Weight]]], norms: Tensor, pages: AdapterPages, segments: Segments
) -> Tensor:
    """The same in float32, with the codes rounded as the kernels round them."""

    def product(x: Tensor, layer: int, group: int) -> Tensor:
        rounded = [replace(part, code=part.code.half().float()) for part in parts[layer][group]]
        y = x @ torch.cat([nf4.dequantize(part, torch.float32) for part in rounded]).T
        lora_add_reference(y, x, pages, layer, sites_of(GROUPS[group]), segments)
        return y

    stream, norms = step.hidden.float(), norms.float()
    for layer in range(LAYERS):
        keys, values = (cache.float() for cache in step.caches[layer])
        heads = product(rms_norm_reference(stream, norms[0], EPS), layer, 0).unflatten(1, (-1, D))
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = (rope_reference(x, step.positions, step.cos_sin) for x in (q, k))
        kv_store_reference(k, v, keys, values, step.slots)
        mixed = paged_attention_reference(
            q, keys, values, step.tables.clamp(min=0), step.cu_seqlens, step.kv_lens, D**-0.5
        ).flatten(1)
        stream = stream + product(mixed, layer, 1)
        gate_up = product(rms_norm_reference(stream, norms[1], EPS), layer, 2)
        stream = stream + product(silu_mul_reference(gate_up), layer, 3)
    return rms_norm_reference(stream, norms[0], EPS)


def make_step(rows: int, device: str) -> Step:
    kv_lens = torch.arange(1, rows + 1, dtype=torch.int32) * 5
    blocks = -(-kv_lens // 16)
    tables = torch.full((rows, int(blocks.max())), -1, dtype=torch.int32)
    numbers = torch.randperm(int(blocks.sum()), dtype=torch.int32)
    for row, count in enumerate(blocks.tolist()):
        tables[row, :count], numbers = numbers[:count], numbers[count:]
    positions = kv_lens.long() - 1
    slots = tables.gather(1, (positions // 16)[:, None]).long()[:, 0] * 16 + positions % 16
    angles = torch.arange(64)[:, None] * torch.logspace(0, -3, D // 2)[None, :]
    caches = [
        tuple(torch.randn(int(blocks.sum()), KV_HEADS, 16, D).half().to(device) for _ in range(2))
        for _ in range(LAYERS)
    ]
    return Step(
        torch.randn(rows, HIDDEN).half().to(device),
        positions.to(device),
        slots.to(device),
        tables.to(device),
        torch.arange(rows + 1, dtype=torch.int32).to(device),
        kv_lens.to(device),
        torch.cat((angles.cos(), angles.sin()), 1).to(device),
        caches,  # type: ignore[arg-type]
    )


def test_two_layers_of_decoding(
    device: str, relative_rms: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 7
    parts = [
        [
            [nf4.quantize(torch.randn(WIDTHS[name][1], WIDTHS[name][0]) * WIDTHS[name][0] ** -0.5) for name in group]
            for group in GROUPS
        ]
        for _ in range(LAYERS)
    ]
    weights = [[Fragments(group, None) for group in layer] for layer in parts]
    if device == "cuda":
        placement = Placement(torch.device(device))
        parts = [[[placement.place(part) for part in group] for group in layer] for layer in parts]
        weights = [[Fragments.on_device(group, None) for group in layer] for layer in parts]
    norms = (1 + 0.1 * torch.randn(2, HIDDEN)).half().to(device)
    pages = adapters(device, 3)
    segments = Segments(  # one row of the base, an empty segment, a mix, and a row behind the last segment
        torch.tensor([1, 3, 3, 4, 6], dtype=torch.int32, device=device),
        torch.tensor([[2, -1], [1, -1], [0, -1], [1, 2]], dtype=torch.int32, device=device),
        torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.6, -0.3]], device=device),
    )
    routes = make_routes(rows + 2, 5, 2, pages, [(WIDTHS[group[0]][0], len(group)) for group in GROUPS])
    fill_routes(routes, segments, pages, rows)
    step = make_step(rows, device)
    expected = by_references(step, parts, norms, pages, segments)

    launches = 0
    kernel = type(gpu.nf4_linear_kernel)
    run = kernel.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launches
        launches += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel, "run", counted)
    actual = on_gpu(step, weights, norms, pages, routes)
    with_adapters, launches = launches, 0
    without = on_gpu(step, weights, norms, pages, None)
    assert with_adapters == launches
    assert relative_rms(actual, expected) < 4e-3
    assert relative_rms(actual, without) > 0.05
    assert relative_rms(actual[[0, 6]], without[[0, 6]]) < 1e-3  # rows of the base
