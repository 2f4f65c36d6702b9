"""The LoRA part of one layer: inside the layer's other kernels (time with minus time without), and on its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu.linear import fragments
from gpu.measure import Case, Figure, Stage, expect_close
from gpu.shapes import Layer, layer
from torch import Tensor

from lorry.kernels import nf4
from lorry.kernels.lora import (
    SITES,
    AdapterPages,
    LoraTerm,
    Routes,
    Segments,
    Site,
    lora_add_reference,
    make_routes,
)

MIXES = ((8, 16), (8, 64), (1, 16), (1, 64), (64, 64))  # distinct adapters, rows
GROUPS = {"qkv": SITES[:3], "o": SITES[3:4], "gate_up": SITES[4:6], "down": SITES[6:]}
EPS = 1e-5


def lora_bytes(shape: Layer, adapters: int) -> int:
    """Of rank 16 in bf16 on all seven linears of a layer: what must be read at least, activations not counted."""
    return 2 * adapters * sum(shape.page_sizes.values())


def make_pages(stage: Stage, shape: Layer, adapters: int, layers: int) -> AdapterPages:
    offsets, end = torch.full((adapters, layers, len(SITES), 1), -1, dtype=torch.int64), 0
    for slot in range(adapters):
        for number in range(layers):
            for site, name in enumerate(SITES):
                offsets[slot, number, site, 0] = end
                end += shape.page_sizes[name]
    arena = stage.randn(end, scale=0.05)
    scaling = torch.ones(adapters, layers, len(SITES), device=stage.device)
    return AdapterPages(arena, offsets.to(stage.device), scaling)


def terms_of(shape: Layer, routes: Routes, pages: AdapterPages, number: int) -> dict[str, LoraTerm]:
    """Of each of the layer's four products."""
    terms = {}
    for name, names in GROUPS.items():
        sizes, k = shape.linears[name]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        sites = tuple(Site(SITES.index(n), *at) for n, at in zip(names, zip(starts, sizes, strict=True), strict=True))
        terms[name] = LoraTerm(routes, pages, number, sites, k)
    return terms


@dataclass
class Decoder:
    """What a layer needs but attention, which LoRA does not touch: o reads q."""

    shape: Layer
    weights: list[dict[str, Any]]
    norm: Tensor
    cos_sin: Tensor
    caches: tuple[Tensor, Tensor]
    positions: Tensor

    def run(
        self, x: Tensor, residual: Tensor, number: int, terms: dict[str, LoraTerm] | None, alone: bool = False
    ) -> Tensor:
        """Ten launches less the two of attention; alone: the LoRA sums by launches of their own."""
        from lorry.kernels.triton.kv_store import qkv_finish
        from lorry.kernels.triton.lora import lora_expand, lora_shrink
        from lorry.kernels.triton.nf4_linear import nf4_linear
        from lorry.kernels.triton.rms_norm import rms_norm
        from lorry.kernels.triton.silu_mul import silu_mul

        weights, given = self.weights[number % len(self.weights)], terms if not alone else None

        def product(name: str, rows: Tensor) -> Tensor:
            y = nf4_linear(rows, weights[name], shrink=given[name] if given else None)
            if alone and terms:
                lora_shrink(rows, terms[name])
                lora_expand(y, terms[name])
            return y

        def term(name: str) -> LoraTerm | None:
            return given[name] if given else None

        qkv = product("qkv", x)
        q = qkv_finish(qkv, self.positions, self.cos_sin, *self.caches, self.positions, lora=term("qkv"))
        y = rms_norm(product("o", q.flatten(1)), self.norm, EPS, residual, term("o"))
        y = silu_mul(product("gate_up", y), term("gate_up"))
        return rms_norm(product("down", y), self.norm, EPS, residual, term("down"))


def make_decoder(stage: Stage, shape: Layer, rows: int) -> Decoder:
    weights = []
    for _ in range(stage.pick(2, 1)):  # a layer's weights are more than the L2 cache holds
        parts = {name: [nf4.quantize(stage.randn(n, k, scale=k**-0.5)) for n in sizes]
                 for name, (sizes, k) in shape.linears.items()}  # fmt: skip
        weights.append({name: fragments(stage, part) for name, part in parts.items()})
    angles = torch.rand(rows, shape.head_dim // 2, device=stage.device)
    cache = torch.zeros(-(-rows // 16), shape.kv_heads, 16, shape.head_dim, dtype=torch.bfloat16, device=stage.device)
    return Decoder(
        shape,
        weights,
        stage.randn(shape.hidden, scale=0.1) + 1,
        torch.cat((angles.cos(), angles.sin()), 1),
        (cache, cache.clone()),
        torch.arange(rows, device=stage.device),
    )


def check_alone(stage: Stage, terms: dict[str, LoraTerm], segments: Segments, rows: int) -> None:
    from lorry.kernels.triton.lora import lora_expand, lora_shrink

    for name, term in terms.items():
        x = stage.randn(rows, term.in_features)
        y = stage.randn(rows, sum(site.size for site in term.sites))
        expected = y.float()
        lora_add_reference(expected, x.float(), term.pages, term.layer, term.sites, segments)
        lora_shrink(x, term)
        lora_expand(y, term)
        expect_close(f"lora {name}", y, expected, 1e-2)


@torch.inference_mode()
def lora(stage: Stage, adapters: int, rows: int) -> Iterator[Figure]:
    from lorry.kernels.lora import fill_routes
    from lorry.kernels.triton.lora import lora_expand, lora_shrink

    shape = layer(stage)
    if stage.dry:
        adapters, rows = min(adapters, 3), min(rows, 5)
    nbytes = lora_bytes(shape, adapters)
    layers = stage.copies(nbytes, most=64)
    pages = make_pages(stage, shape, adapters, layers)
    starts = torch.linspace(0, rows, adapters + 1).int().to(stage.device)
    slots = torch.arange(adapters, dtype=torch.int32, device=stage.device)[:, None]
    segments = Segments(starts, slots, torch.ones(adapters, 1, device=stage.device))
    routes = make_routes(rows, adapters, 1, pages, [(k, len(sizes)) for sizes, k in shape.linears.values()])
    fill_routes(routes, segments, pages, rows)
    terms = [terms_of(shape, routes, pages, number) for number in range(layers)]
    check_alone(stage, terms[-1], segments, rows)

    decoder = make_decoder(stage, shape, rows)
    x, residual = stage.randn(rows, shape.hidden), stage.randn(rows, shape.hidden)
    fused, separate = (decoder.run(x, residual.clone(), 0, terms[0], alone) for alone in (False, True))
    expect_close("a layer's LoRA inside its kernels", fused, separate, 2e-2)

    calls = {
        mode: [partial(decoder.run, x, residual, number, chosen) for number, chosen in enumerate(part)]
        for mode, part in (("with", terms), ("without", [None] * layers))
    }
    what = f"{adapters} adapters of rank 16"
    figure = Figure("lora in a layer", what, rows, None, nbytes, plan=f"tiles of {routes.tile_rows}")
    times = {mode: stage.time(chosen, figure.eager, mode) for mode, chosen in calls.items()}
    if times["with"] is not None and times["without"] is not None:
        figure.seconds = max(times["with"] - times["without"], 1e-9)
    figure.parts = {"layer with LoRA": times["with"], "layer without": times["without"]}
    yield figure

    inputs = {name: stage.randn(rows, term.in_features) for name, term in terms[0].items()}
    outputs = {name: stage.randn(rows, sum(s.size for s in term.sites)) for name, term in terms[0].items()}

    def alone(number: int) -> None:
        for name, term in terms[number].items():
            lora_shrink(inputs[name], term)
            lora_expand(outputs[name], term)

    figure = Figure("lora alone", what, rows, None, nbytes, plan=f"tiles of {routes.tile_rows}")
    figure.seconds = stage.time([partial(alone, number) for number in range(layers)], figure.eager)
    yield figure


CASES: dict[str, Case] = {
    f"lora {adapters} adapters, {rows} rows": partial(lora, adapters=adapters, rows=rows) for adapters, rows in MIXES
}
