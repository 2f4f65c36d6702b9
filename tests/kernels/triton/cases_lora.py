"""Launches of the LoRA kernels in the shapes of Llama-3-8B, to be compiled; see assembly.py."""

from __future__ import annotations

from functools import partial

import torch

from lorry.kernels.lora import EMBEDDING, HEAD, SITES, AdapterPages, LoraTerm, Segments, Site, make_routes
from lorry.kernels.triton.lora import lora_expand, lora_gather, lora_shrink
from lorry.kernels.triton.lora_routes import fill_routes
from lorry.kernels.triton.rms_norm import rms_norm
from lorry.kernels.triton.silu_mul import silu_mul

LAYERS, SLOTS, MAX_PAGES = 32, 64, 16
SIZES = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}
WIDTHS = ((4096, 3), (4096, 1), (4096, 2), (14336, 1))


def pages(dtype: torch.dtype) -> AdapterPages:
    shape = (SLOTS, LAYERS, len(SITES))
    return AdapterPages(
        arena=torch.empty(1 << 20, dtype=dtype),
        offsets=torch.empty(*shape, MAX_PAGES, dtype=torch.int64),
        scaling=torch.empty(shape, dtype=torch.float32),
    )


def term(rows: int, sizes: dict[str, int], in_features: int, dtype: torch.dtype = torch.bfloat16) -> LoraTerm:
    """Of an inner layer: the number of the first one would be compiled in."""
    adapters = pages(dtype)
    starts = [sum([*sizes.values()][:index]) for index in range(len(sizes))]
    sites = tuple(Site(SITES.index(name), start, sizes[name]) for name, start in zip(sizes, starts, strict=True))
    return LoraTerm(make_routes(rows, rows, 1, adapters, WIDTHS), adapters, 3, sites, in_features)


def computing(dtype: torch.dtype) -> torch.dtype:
    """Of x, where that of the pages is no number's."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def shrink(rows: int, dtype: torch.dtype) -> None:
    lora_shrink(torch.empty(rows, 4096, dtype=computing(dtype)), term(rows, SIZES, 4096, dtype))


def expand(rows: int, dtype: torch.dtype) -> None:
    lora_expand(torch.empty(rows, sum(SIZES.values()), dtype=computing(dtype)), term(rows, SIZES, 4096, dtype))


def end(rows: int, site: int, in_features: int, out_features: int) -> LoraTerm:
    adapters = pages(torch.bfloat16)
    routes = make_routes(rows, rows, 1, adapters, WIDTHS)
    return LoraTerm(routes, adapters, 0, (Site(site, 0, out_features),), in_features, one_hot=site == EMBEDDING)


def gather(rows: int) -> None:
    lora_gather(torch.empty(rows, dtype=torch.int64), end(rows, EMBEDDING, 128256, 4096))


def head(rows: int) -> None:
    lora_expand(torch.empty(rows, 128256), end(rows, HEAD, 4096, 128256))


def fill(rows: int) -> None:
    adapters = pages(torch.bfloat16)
    segments = Segments(
        torch.empty(rows + 1, dtype=torch.int32), torch.empty(rows, 2, dtype=torch.int32), torch.empty(rows, 2)
    )
    fill_routes(make_routes(rows, rows, 1, adapters, WIDTHS), segments, adapters, rows)


def norm(rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight = torch.empty(rows, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    rms_norm(x, weight, 1e-5, x, term(rows, {"down_proj": 4096}, 14336, dtype))


def gated(rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    gate_up = torch.empty(rows, 2 * 14336, dtype=torch.bfloat16)
    silu_mul(gate_up, term(rows, {"gate_proj": 14336, "up_proj": 14336}, 4096, dtype))


CASES = {
    "lora fill": partial(fill, 64),
    "lora gather": partial(gather, 64),
    "lora head": partial(head, 64),
    "lora shrink float32": partial(shrink, 64, torch.float32),
    "lora expand float32": partial(expand, 64, torch.float32),
    "rms_norm residual lora": partial(norm, 64),
    "silu_mul lora": partial(gated, 64),
    "rms_norm residual lora int8": partial(norm, 64, torch.int8),
    "silu_mul lora int8": partial(gated, 64, torch.int8),
} | {
    f"lora {what.__name__} {dtype} {rows}": partial(what, rows, dtype)
    for what in (shrink, expand)
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
    for rows in (64, 4096)
}
