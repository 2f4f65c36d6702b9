"""Launches of paged attention with the heads of Llama-3-8B and others; see assembly.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorry.kernels.triton.paged_attention import paged_attention


def case(
    rows: int,
    longest: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int = 0,
) -> Callable[[], object]:
    """Sequences of `longest` rows each."""

    def launch() -> object:
        sequences = rows // longest
        caches = torch.empty(2, 1024, kv_heads, 16, width, dtype=dtype)
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


CASES: dict[str, Callable[[], object]] = {
    f"{plan} {name}": case(1024, longest, *shape, window=window)
    for plan, longest in (("decode", 1), ("prefill", 512))
    for name, shape, window in (
        ("32/8x128", (32, 8, 128), 0),
        ("14/2x64 window", (14, 2, 64), 4096),
        ("8/4x256", (8, 4, 256), 0),
    )
}
