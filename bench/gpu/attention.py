"""Paged attention against its bytes (decode) and against scaled_dot_product_attention on contiguous keys."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from gpu.measure import Case, Figure, Stage, expect_close
from gpu.shapes import layer
from torch import Tensor

from lorry.kernels.paged_attention import paged_attention_reference

DECODE = ((16, 4096), (1, 1024), (64, 1024), (256, 1024))  # sequences, context
PREFILL = ((1, 4096), (8, 1024))  # sequences, tokens of each
CHECKED = 4  # sequences that the reference does


def paged(
    stage: Stage, sequences: int, context: int, copies: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Caches, block table, lengths; blocks in no order."""
    shape, blocks = layer(stage), -(-context // 16)
    size = (sequences * blocks, shape.kv_heads, 16, shape.head_dim)
    caches = [(stage.randn(*size), stage.randn(*size)) for _ in range(copies)]
    table = torch.randperm(sequences * blocks).int().view(sequences, blocks).to(stage.device)
    return caches, table, torch.full((sequences,), context, dtype=torch.int32, device=stage.device)


def contiguous(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """[S, Hk, context, D]"""
    return cache[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous()


@torch.inference_mode()
def decode(stage: Stage, sequences: int, context: int) -> Iterator[Figure]:
    from lorry.kernels.triton.paged_attention import paged_attention

    if stage.dry:
        sequences, context = min(sequences, 2), 37
    shape = layer(stage)
    moved = 2 * 2 * sequences * context * shape.kv_heads * shape.head_dim
    caches, table, lens = paged(stage, sequences, context, stage.copies(moved, most=64))
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=stage.device)
    q = stage.randn(sequences, shape.heads, shape.head_dim)
    scale, some = shape.head_dim**-0.5, min(CHECKED, sequences)

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return paged_attention(q, keys, values, table, bounds, lens, scale, max_query_len=1, sms=stage.sms)

    expected = paged_attention_reference(
        q[:some].float(), *caches[0], table[:some], bounds[: some + 1], lens[:some], scale
    )
    expect_close(f"decode of {sequences} x {context}", attend(*caches[0])[:some], expected, 1e-2)
    flops = 4.0 * sequences * shape.heads * context * shape.head_dim
    figure = Figure("attention decode", f"{sequences} sequences of {context}", sequences, None, moved, flops)
    figure.seconds = stage.time([partial(attend, *pair) for pair in caches], figure.eager)
    plain = [(contiguous(keys, table, context), contiguous(values, table, context)) for keys, values in caches]
    peer = [partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True) for k, v in plain]
    figure.peers["SDPA, contiguous"] = stage.time(peer, figure.eager, "SDPA, contiguous")
    yield figure


@torch.inference_mode()
def prefill(stage: Stage, sequences: int, context: int) -> Iterator[Figure]:
    from lorry.kernels.triton.paged_attention import paged_attention

    if stage.dry:
        sequences, context = min(sequences, 2), 21
    shape = layer(stage)
    [(keys, values)], table, lens = paged(stage, sequences, context, 1)
    bounds = torch.arange(0, (sequences + 1) * context, context, dtype=torch.int32, device=stage.device)
    q = stage.randn(sequences * context, shape.heads, shape.head_dim)
    scale = shape.head_dim**-0.5
    limits = {"min_query_len": context, "max_query_len": context, "sms": stage.sms}
    attend = partial(paged_attention, q, keys, values, table, bounds, lens, scale, **limits)
    expected = paged_attention_reference(q[:context].float(), keys, values, table[:1], bounds[:2], lens[:1], scale)
    expect_close(f"prefill of {sequences} x {context}", attend()[:context], expected, 1e-2)
    flops = 2.0 * sequences * shape.heads * context * context * shape.head_dim  # the half that is seen
    moved = 2 * q.nbytes + 2 * 2 * sequences * context * shape.kv_heads * shape.head_dim
    figure = Figure("attention prefill", f"{sequences} sequences of {context}", len(q), None, moved, flops)
    figure.seconds = stage.time([attend], figure.eager)
    plain_keys, plain_values = contiguous(keys, table, context), contiguous(values, table, context)
    queries = q.view(sequences, context, *q.shape[1:]).transpose(1, 2).contiguous()
    peer = partial(F.scaled_dot_product_attention, queries, plain_keys, plain_values, is_causal=True, enable_gqa=True)
    figure.peers["SDPA, contiguous"] = stage.time([peer], figure.eager, "SDPA, contiguous")
    yield figure


CASES: dict[str, Case] = {
    **{f"attention decode {s}x{c}": partial(decode, sequences=s, context=c) for s, c in DECODE},
    **{f"attention prefill {s}x{c}": partial(prefill, sequences=s, context=c) for s, c in PREFILL},
}
