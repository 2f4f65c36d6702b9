"""Launches of qkv_finish with the heads of Llama-3-8B; see assembly.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorry.kernels.lora import AdapterPages, LoraTerm, Site, make_routes
from lorry.kernels.triton.kv_store import qkv_finish

HEADS, KV_HEADS, WIDTH, HIDDEN = 32, 8, 128, 4096


def case(norm: bool = False, lora: bool = False, cache_dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def launch() -> object:
        rows, dtype = 32, torch.bfloat16
        norms = {name: torch.empty(WIDTH, dtype=dtype) for name in ("q_norm", "k_norm")} if norm else {}
        return qkv_finish(
            torch.empty(rows, (HEADS + 2 * KV_HEADS) * WIDTH, dtype=dtype),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(8192, WIDTH),
            *torch.empty(2, 1024, KV_HEADS, 16, WIDTH, dtype=cache_dtype),
            torch.empty(rows, dtype=torch.int64),
            **norms,
            lora=term(rows, dtype) if lora else None,
        )

    return launch


def term(rows: int, dtype: torch.dtype) -> LoraTerm:
    offsets = torch.empty(8, 2, 7, 1, dtype=torch.int64)
    pages = AdapterPages(torch.empty(1 << 20, dtype=dtype), offsets, torch.empty(8, 2, 7))
    sizes = (HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH)
    sites = tuple(Site(index, sum(sizes[:index]), size) for index, size in enumerate(sizes))
    return LoraTerm(make_routes(rows, 8, 1, pages, [(HIDDEN, 3)]), pages, 1, sites, HIDDEN)


CASES: dict[str, Callable[[], object]] = {
    "qkv_finish": case(),
    "qkv_finish norm": case(norm=True),
    "qkv_finish lora": case(lora=True),
    "qkv_finish fp8": case(cache_dtype=torch.float8_e4m3fn),
}
