"""Causal attention of flat query rows over a paged KV cache; decode, chunked prefill and mixes of both.

    y[i, h] = softmax(scale * q[i, h] @ K[:p + 1, h // G].T) @ V[:p + 1, h // G],   p = position of row i

Row i of sequence s stands at position kv_lens[s] - q_len[s] + i. With a sliding window W only positions
p - W + 1 .. p are seen. Grouped heads: G = Hq / Hk query heads share one key head. Source: FlashAttention
(arXiv:2205.14135) for the online softmax, PagedAttention (arXiv:2309.06180) for the block table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.kernels import dispatch, native
from lorry.kernels.kv_store import as_bits, fits_kernels

BLOCK_SIZE = 16  # what the CPU kernel serves; see csrc/attention.c for the limits below
MAX_HEAD_DIM = 256
MAX_GROUP = 64


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """softmax(scale * q @ K.T, causal) @ V per sequence, in float32; shapes as in `paged_attention`."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    block_size = k_cache.shape[2]
    group = q.shape[1] // k_cache.shape[1]
    bounds = cu_seqlens_q.tolist()
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        start, stop = bounds[sequence], bounds[sequence + 1]
        if start == stop:
            continue
        blocks = block_tables[sequence, : -(-kv_len // block_size)].long()
        keys, values = (
            as_bits(cache)[blocks]
            .view(cache.dtype)
            .transpose(1, 2)
            .flatten(0, 1)[:kv_len]
            .float()
            .repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )  # [kv_len, Hq, D]
        query_pos = torch.arange(kv_len - (stop - start), kv_len, device=q.device).unsqueeze(1)
        key_pos = torch.arange(kv_len, device=q.device).unsqueeze(0)
        hidden = key_pos > query_pos
        if sliding_window > 0:
            hidden |= key_pos <= query_pos - sliding_window
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float() * scale, keys)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    *,
    min_query_len: int = 0,
    max_query_len: int | None = None,
) -> Tensor:
    """softmax(scale * q @ K.T, causal) @ V for every row of every sequence of the batch.

    q: [T, Hq, D], strided views allowed; caches: [num_blocks, Hk, B, D] as `empty_caches` makes them, float32,
    bfloat16, float16 or e4m3; block_tables: int32 [S, max_blocks]; cu_seqlens_q: int32 [S + 1], rows cu[s]..cu[s+1]
    are sequence s (may be none); kv_lens: int32 [S], tokens in the cache including this step's own; scale: usually
    D ** -0.5; sliding_window: tokens seen including the row's own, 0 for all. Returns [T, Hq, D] contiguous, q's dtype.
    Entries of block_tables outside what the rows see are not read.

    min_query_len, max_query_len: the fewest and the most rows of any sequence that has rows, as far as the caller
    knows them; what they promise must hold. A GPU, which cannot look without waiting, is spared the launch for
    sequences of few rows or that for sequences of many. Rows of no sequence are undefined there, and what its kernels
    do not serve raises ValueError.
    """
    if dispatch.on_gpu(q):
        from lorry.kernels.triton import paged_attention as gpu

        return gpu.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            cu_seqlens_q,
            kv_lens,
            scale,
            sliding_window,
            min_query_len=min_query_len,
            max_query_len=max_query_len,
        )
    library = native.library()
    rows, heads, width = q.shape
    if library is None or not _fits(q, k_cache, v_cache, width) or not _int32(block_tables, cu_seqlens_q, kv_lens):
        return paged_attention_reference(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, scale, sliding_window
        )
    kv_heads = k_cache.shape[1]
    q_strides = q.stride()
    out = torch.empty(rows, heads, width)
    status = library.paged_attention(
        q.data_ptr(),
        q_strides[0],
        q_strides[1],
        heads,
        kv_heads,
        width,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        native.CACHE_TYPES[k_cache.dtype],
        block_tables.data_ptr(),
        block_tables.stride()[0],
        cu_seqlens_q.data_ptr(),
        kv_lens.data_ptr(),
        len(kv_lens),
        scale,
        sliding_window,
        out.data_ptr(),
    )
    native.check(status)
    return out


def _fits(q: Tensor, k_cache: Tensor, v_cache: Tensor, width: int) -> bool:
    _, kv_heads, block_size, _ = k_cache.shape
    return (
        q.dtype is torch.float32
        and q.stride()[2] == 1
        and width % 16 == 0
        and width <= MAX_HEAD_DIM
        and q.shape[1] // kv_heads <= MAX_GROUP
        and block_size == BLOCK_SIZE
        and fits_kernels(k_cache, v_cache)
    )


def _int32(block_tables: Tensor, cu_seqlens_q: Tensor, kv_lens: Tensor) -> bool:
    return (
        block_tables.dtype is torch.int32
        and cu_seqlens_q.dtype is torch.int32
        and kv_lens.dtype is torch.int32
        and block_tables.stride()[1] == 1
        and cu_seqlens_q.is_contiguous()
        and kv_lens.is_contiguous()
    )
