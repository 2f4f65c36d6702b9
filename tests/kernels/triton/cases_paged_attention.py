"""Launches of paged attention with the heads of Llama-3-8B and others; see assembly.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorry.kernels.kv_store import FP8
from lorry.kernels.triton.paged_attention import paged_attention


def case(
    rows: int,
    longest: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> Callable[[], object]:
    """Sequences of `longest` rows each."""

    def launch() -> object:
        sequences = rows // longest
        caches = torch.empty(2, 1024, kv_heads, 16, width, dtype=cache_dtype or dtype)
        return paged_attention(
            torch.empty(rows, (heads + 2 * kv_heads) * width, dtype=dtype)[:, : heads * width].view(rows, heads, width),
            *caches,
            torch.empty(sequences, 512, dtype=torch.int32),
            torch.empty(sequences + 1, dtype=torch.int32),
            torch.empty(sequences, dtype=torch.int32),
            width**-0.5,
            window,
            min_query_len=longest,
            max_query_len=longest,
        )

    return launch


SHAPES: dict[str, Callable[[int], Callable[[], object]]] = {
    "32/8x128": lambda longest: case(1024, longest, 32, 8, 128),
    "14/2x64 window": lambda longest: case(1024, longest, 14, 2, 64, window=4096),
    "8/4x256": lambda longest: case(1024, longest, 8, 4, 256),
    "fp8 32/8x128": lambda longest: case(1024, longest, 32, 8, 128, cache_dtype=FP8),
    "fp8 14/2x64 window": lambda longest: case(1024, longest, 14, 2, 64, torch.float16, 4096, FP8),
    "fp8 8/4x256": lambda longest: case(1024, longest, 8, 4, 256, cache_dtype=FP8),
}
CASES: dict[str, Callable[[], object]] = {
    f"{plan} {name}": shape(longest)
    for plan, longest in (("decode", 1), ("prefill", 512))
    for name, shape in SHAPES.items()
}
