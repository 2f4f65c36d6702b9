"""y[i, h] = softmax(scale * q[i, h] @ K[visible].T) @ V[visible] on a GPU; see `lorry.kernels.paged_attention`.

**Layout.** Keys and values are [num_blocks, Hk, 16, D], so that the 16 tokens of a block of one head lie side by side.
The G = Hq / Hk query heads of a key head share one tile, row m of which is head m % G of query m // G: a key is read
once for all of them. A tile of keys is 16 to 128 tokens, gathered by the block table.

**Two plans**, chosen for each sequence by its own number of query rows, each a launch that skips the other's sequences:

- decode, to `decode_queries(G)` rows, as many as fit one tile of 16: the visible keys are cut into splits (`_splits`),
  whose length is a function of the sequence's own length and window; program (sequence, key head, split). A sequence of
  one split is finished there; otherwise parts in float32, unnormalized, with their maxima and sums, go to a workspace,
  and a second kernel adds them in the order of the splits.
- prefill, beyond: program (tile of queries, key head) walks over all visible keys, first those that all rows see, then
  the diagonal and the window's edge, which are masked.

So a row's bits depend on its sequence alone, not on the others of the batch. Grids have the capacity that follows from
shapes; a program without work returns at once, and nothing is read back from the device.

**Roundings.** Scores, exponentials and sums are float32, exponentials in base 2 with log2(e) folded into the scale. The
weights exp2(s - max) are rounded to the caches' dtype before they multiply V, y to its own. Where q and the caches
differ in dtype, and in float32, products are float32 (not TF32).

**Caches in e4m3** are read as 16-bit words of two neighbouring dimensions. Unpacked, the even dimensions are one
operand and the odd ones another, in q's dtype, which holds them exactly; scores are the sum of two products, and y is
computed in two halves. So tiles take the way of 16-bit caches of half the width, and decoding unpacks a number in the
registers from which it is multiplied. Prefill, where several warps multiply each number, unpacks it once and passes it
through shared memory. The weights are rounded to q's dtype.

Bound: decode 2 kv_len Hk D numbers of the caches a sequence, prefill 4 Hq D operations a visible pair. Tiles and splits
below are calculated, not yet measured on a GPU. Source: FlashAttention-2 (arXiv:2307.08691), Flash-Decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.kv_store import CACHE_DTYPES, FP8
from lorry.kernels.nf4 import FLOAT_DTYPES
from lorry.kernels.triton.common import FUSION, dot, multiprocessors, rounded
from lorry.kernels.triton.fp8 import unpack_pairs

BLOCK_SIZE = 16
HEAD_DIMS = range(16, 257, 16)
MAX_GROUP = 64
DECODE_ROWS = 16  # of a tile, the least that tensor cores take
LEAST_SPLIT = 256  # tokens
MOST_SPLITS = 128
REDUCE_SPLITS = 8  # that the reduction loads at once


@dataclass(frozen=True)
class Tiling:
    """rows: of queries times heads; keys: tokens; stages: tiles of keys in flight."""

    rows: int
    keys: int
    stages: int
    warps: int


@triton.jit
def _over_keys(
    total, odd_total, maximum, weights, q, odd_q, k_cache, v_cache, table, start, stop, gap, skipped, first, end,
    position, window, factor, k_stride, v_stride, D: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, ONCE_K: tl.constexpr, ONCE_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds keys to total [M, D], maximum [M] and weights [M]; start is a multiple of KEYS.

    Where the caches are words of two numbers, D counts the words, q and total are the even dimensions, odd_q and
    odd_total the odd ones, and ONCE_K and ONCE_V say how words are unpacked; otherwise odd_q and odd_total are nothing.

    The keys are [start, gap) and, `skipped` further, [gap, stop). Those outside [first, end) are not read, with
    MASKED; without, all keys are there and all rows see them.
    position [M]: of each row in its sequence.
    """
    PAIRS: tl.constexpr = k_cache.dtype.element_ty == tl.int16
    d = tl.arange(0, q.shape[1])
    for begin in tl.range(start, stop, KEYS, num_stages=STAGES):
        n = begin + tl.arange(0, KEYS)
        if MASKED:
            if WINDOW:
                n += tl.where(begin >= gap, skipped, 0)
            inside = (n >= first) & (n < end)
            block = tl.load(table + n // 16, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (d < D)[None, :]
        else:
            block = tl.load(table + n // 16).to(tl.int64)
            mask = (d < D)[None, :]
        within = ((n % 16) * D)[:, None] + d[None, :]
        k = tl.load(k_cache + (block * k_stride)[:, None] + within, mask=mask, other=0.0)
        scores = tl.zeros((q.shape[0], KEYS), tl.float32)
        if PAIRS:
            k, odd_k = unpack_pairs(k, q.dtype, ONCE_K)
            scores = dot(odd_q, odd_k.T, scores)
        elif WIDE:
            k = k.to(tl.float32)
        scores = dot(q, k.T, scores)
        if MASKED:
            seen = inside[None, :] & (n[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (n[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(maximum, tl.max(scores, 1) * factor)
        base = raised
        if MASKED:  # rows that have seen nothing yet
            base = tl.where(raised == float("-inf"), 0.0, raised)
        p = tl.exp2(scores * factor - base[:, None])
        decay = tl.exp2(maximum - base)
        maximum = raised
        weights = weights * decay + tl.sum(p, 1)
        v = tl.load(v_cache + (block * v_stride)[:, None] + within, mask=mask, other=0.0)
        if PAIRS:
            v, odd_v = unpack_pairs(v, q.dtype, ONCE_V)
            odd_total = dot(rounded(p, odd_v.dtype), odd_v, odd_total * decay[:, None])
        elif WIDE:
            v = v.to(tl.float32)
        total = dot(rounded(p, v.dtype), v, total * decay[:, None])
    return total, odd_total, maximum, weights


@triton.jit
def _queries(
    q, row, head, mask, stride_row, stride_head, D: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """[M, WIDTH] of q, zeros outside, and nothing; with HALVES, its even dimensions and its odd ones."""
    d = tl.arange(0, WIDTH)
    place = q + row.to(tl.int64)[:, None] * stride_row + (head * stride_head)[:, None] + d[None, :]
    tile = tl.load(place, mask=mask[:, None] & (d < D)[None, :], other=0.0)
    if WIDE:
        tile = tile.to(tl.float32)
    if HALVES:
        return tl.split(tl.reshape(tile, (tile.shape[0], WIDTH // 2, 2)))
    else:
        return tile, 0


@triton.jit
def _nothing_yet(ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    """total and odd_total, maximum and weights before the first key."""
    maximum, weights = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if HALVES:
        zeros = tl.zeros((ROWS, WIDTH // 2), tl.float32)
        return zeros, zeros, maximum, weights
    else:
        return tl.zeros((ROWS, WIDTH), tl.float32), 0, maximum, weights


@triton.jit
def _interleaved(even, odd):
    """[M, N] and [M, N] → [M, 2 N]"""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _store(out, values, row, head, mask, HEADS: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, values.shape[1])
    place = out + (row.to(tl.int64)[:, None] * HEADS + head[:, None]) * D + d[None, :]
    tl.store(place, rounded(values, out.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _splits(kv_len, count, window, SPLITS: tl.constexpr, LEAST: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that any row sees, the length of a split and the number of splits of a sequence.

    Splits begin at multiples of their length, a multiple of KEYS; at most SPLITS + 1 hold visible keys, without a
    window SPLITS.
    """
    first = tl.zeros((), tl.int32)
    if WINDOW:
        first = tl.maximum(kv_len - count - window + 1, 0)
    length = tl.maximum(LEAST, tl.cdiv(tl.cdiv(kv_len - first, SPLITS), KEYS) * KEYS)
    return first, length, tl.cdiv(kv_len, length) - first // length


@triton.jit(do_not_specialize=["slots", "stride_table"])
def decode_kernel(
    out, parts, maxima, sums, q, k_cache, v_cache, block_tables, cu_seqlens, kv_lens, factor, window, slots,
    stride_row, stride_head, k_stride, v_stride, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key head, split). parts [S, QUERIES, Hq, slots, D]; maxima, sums [S, QUERIES, Hq, slots]."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + sequence)
    count = tl.load(cu_seqlens + sequence + 1) - start
    kv_len = tl.load(kv_lens + sequence)
    if (count <= 0) | (count > QUERIES) | ((split > 0) & (split * LEAST >= kv_len)):
        return
    first, length, splits = _splits(kv_len, count, window, SPLITS, LEAST, KEYS, WINDOW)
    if (split > 0) & (split >= splits):
        return

    HALVES: tl.constexpr = k_cache.dtype.element_ty == tl.int16
    WORDS: tl.constexpr = D // 2 if HALVES else D
    m = tl.arange(0, ROWS)
    query, head = m // GROUP, kv_head * GROUP + m % GROUP
    mask = query < count
    tile, odd_tile = _queries(q, start + query, head, mask, stride_row, stride_head, D, WIDTH, WIDE, HALVES)
    begin = (first // length + split) * length
    table = block_tables + sequence.to(tl.int64) * stride_table
    total, odd_total, maximum, weights = _nothing_yet(ROWS, WIDTH, HALVES)
    total, odd_total, maximum, weights = _over_keys(
        total, odd_total, maximum, weights, tile, odd_tile,
        k_cache + kv_head * 16 * WORDS, v_cache + kv_head * 16 * WORDS, table,
        tl.maximum(begin, first // KEYS * KEYS), tl.minimum(begin + length, kv_len), kv_len, 0, first, kv_len,
        kv_len - count + query, window, factor, k_stride, v_stride, WORDS, KEYS, WINDOW, True, WIDE,
        False, False, STAGES,
    )  # fmt: skip
    if HALVES:
        total = _interleaved(total, odd_total)
    if splits <= 1:
        weights = tl.where(weights == 0.0, 1.0, weights)  # of a sequence without keys: zeros
        _store(out, total / weights[:, None], start + query, head, mask, KV_HEADS * GROUP, D)
    else:
        slot = ((sequence.to(tl.int64) * QUERIES + query) * (KV_HEADS * GROUP) + head) * slots + split
        d = tl.arange(0, WIDTH)
        tl.store(maxima + slot, maximum, mask=mask)
        tl.store(sums + slot, weights, mask=mask)
        tl.store(parts + slot[:, None] * D + d[None, :], total, mask=mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["slots"])
def reduce_kernel(
    out, parts, maxima, sums, cu_seqlens, kv_lens, window, slots, HEADS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = sum_i 2**(max_i - max) part_i / sum_i 2**(max_i - max) sum_i, program (sequence, query, head)."""
    sequence, query, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + sequence)
    count = tl.load(cu_seqlens + sequence + 1) - start
    kv_len = tl.load(kv_lens + sequence)
    if (query >= count) | (count > QUERIES) | (kv_len <= LEAST):
        return
    _, _, splits = _splits(kv_len, count, window, SPLITS, LEAST, KEYS, WINDOW)
    if splits <= 1:
        return

    slot = ((sequence.to(tl.int64) * QUERIES + query) * HEADS + head) * slots
    d = tl.arange(0, WIDTH)
    total, weights = tl.zeros((WIDTH,), tl.float32), 0.0
    maximum = float("-inf")
    for begin in range(0, splits, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        raised = tl.maximum(maximum, tl.max(tl.load(maxima + slot + i, mask=i < splits, other=float("-inf"))))
        maximum = raised
    for begin in range(0, splits, CHUNK):
        i = begin + tl.arange(0, CHUNK)
        there = i < splits
        weight = tl.exp2(tl.load(maxima + slot + i, mask=there, other=float("-inf")) - maximum)
        weights += tl.sum(weight * tl.load(sums + slot + i, mask=there, other=0.0))
        part = tl.load(parts + (slot + i)[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(part * weight[:, None], 0)
    place = out + ((start + query).to(tl.int64) * HEADS + head) * D + d
    tl.store(place, rounded(total / weights, out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["sequences", "stride_table"])
def prefill_kernel(
    out, q, k_cache, v_cache, block_tables, cu_seqlens, kv_lens, factor, window, sequences,
    stride_row, stride_head, k_stride, v_stride, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DECODE_QUERIES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, key head), the last tiles, which see the most keys, first."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    low = tl.zeros((), tl.int32)  # sequence s has tiles from cu_seqlens[s] // QUERIES + s on: room for ragged ends
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) // QUERIES + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(cu_seqlens + low)
    count = tl.load(cu_seqlens + low + 1) - start
    begin = (tile - start // QUERIES - low) * QUERIES
    if (begin >= count) | (count <= DECODE_QUERIES):
        return

    HALVES: tl.constexpr = k_cache.dtype.element_ty == tl.int16
    WORDS: tl.constexpr = D // 2 if HALVES else D
    ONCE_K: tl.constexpr = ROWS > 64  # with fewer, few warps need a key; unpacked once, it takes too many registers
    m = tl.arange(0, ROWS)
    query, head = begin + m // GROUP, kv_head * GROUP + m % GROUP
    mask = (m < QUERIES * GROUP) & (query < count)
    queries, odd_queries = _queries(q, start + query, head, mask, stride_row, stride_head, D, WIDTH, WIDE, HALVES)
    offset = tl.load(kv_lens + low) - count
    lowest, end = offset + begin, offset + tl.minimum(begin + QUERIES, count)  # positions of the tile's queries
    first, edge, whole = 0, 0, 0  # masked are [edge, whole) and [diagonal, end); between them, all rows see all keys
    if WINDOW:
        first = tl.maximum(lowest - window + 1, 0)
        edge = first // KEYS * KEYS
        whole = tl.maximum(tl.cdiv(end - window, KEYS) * KEYS, 0)
    diagonal = tl.maximum((lowest + 1) // KEYS * KEYS, whole)
    if WINDOW:
        masked_end = whole + tl.maximum(end - diagonal, 0)
    else:
        edge, masked_end = diagonal, end
    table = block_tables + low.to(tl.int64) * stride_table
    keys, values = k_cache + kv_head * 16 * WORDS, v_cache + kv_head * 16 * WORDS
    position = offset + query
    total, odd_total, maximum, weights = _nothing_yet(ROWS, WIDTH, HALVES)
    total, odd_total, maximum, weights = _over_keys(
        total, odd_total, maximum, weights, queries, odd_queries, keys, values, table, whole, diagonal, diagonal, 0,
        first, end, position, window, factor, k_stride, v_stride, WORDS, KEYS, WINDOW, False, WIDE,
        ONCE_K, True, STAGES,
    )  # fmt: skip
    total, odd_total, maximum, weights = _over_keys(
        total, odd_total, maximum, weights, queries, odd_queries, keys, values, table,
        edge, masked_end, whole, diagonal - whole,
        first, end, position, window, factor, k_stride, v_stride, WORDS, KEYS, WINDOW, True, WIDE,
        ONCE_K, True, STAGES,
    )  # fmt: skip
    if HALVES:
        total = _interleaved(total, odd_total)
    _store(out, total / weights[:, None], start + query, head, mask, KV_HEADS * GROUP, D)


def decode_queries(group: int) -> int:
    """Most query rows of a sequence that the decode plan serves."""
    return max(1, DECODE_ROWS // group)


def most_splits(kv_heads: int, sms: int) -> int:
    """Splits of a sequence: about two programs for each multiprocessor if it is alone, whoever else is there."""
    return max(1, min(MOST_SPLITS, 2 * sms // kv_heads))


def decode_tiling(group: int, width: int, wide: bool, fp8: bool) -> Tiling:
    rows = max(DECODE_ROWS, triton.next_power_of_2(group))
    if wide:
        return Tiling(rows, 32 if width <= 128 else 16, stages=3, warps=8)
    keys = 128 if width <= 64 else 64 if width <= 128 else 32
    return Tiling(rows, min(2 * keys, 128) if fp8 else keys, stages=3, warps=4)


def prefill_tiling(group: int, width: int, wide: bool, fp8: bool) -> Tiling:
    """Three stages: one for the numbers of the blocks, one for what lies in them, one for the products."""
    if wide:
        return Tiling(max(16, triton.next_power_of_2(group)), 32 if width <= 128 else 16, stages=3, warps=8)
    if width <= 128:
        return Tiling(128, 32 if fp8 and width > 64 else 64, stages=3, warps=8)
    return Tiling(64, 32, stages=3, warps=8)


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
    sms: int | None = None,
) -> Tensor:
    """As `lorry.kernels.paged_attention.paged_attention`; sms: multiprocessors, of q's device where not given.

    Rows outside of every sequence are not written. Raises ValueError for what the kernels do not serve.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, scale)
    rows, heads, width = q.shape
    kv_heads, sequences = k_cache.shape[1], kv_lens.shape[0]
    group = heads // kv_heads
    out = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    if rows == 0 or sequences == 0:
        return out
    longest = rows if max_query_len is None else min(max_query_len, rows)
    few = decode_queries(group)
    fp8 = k_cache.dtype is FP8
    wide = q.dtype is torch.float32 or not (fp8 or q.dtype is k_cache.dtype)
    if fp8:  # words of two numbers
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    padded = max(32 if fp8 else 16, triton.next_power_of_2(width))
    common = {"D": width, "WIDTH": padded, "WINDOW": sliding_window > 0}
    inputs = (q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, scale * math.log2(math.e), sliding_window)
    strides = (q.stride(0), q.stride(1), k_cache.stride(0), v_cache.stride(0), block_tables.stride(0))
    if min_query_len <= few:
        tiling = decode_tiling(group, width, wide, fp8)
        queries = min(few, triton.next_power_of_2(longest))
        splits = most_splits(kv_heads, sms or multiprocessors(q.device))
        least = -(-LEAST_SPLIT // tiling.keys) * tiling.keys
        capacity = block_tables.shape[1] * BLOCK_SIZE
        slots = min(-(-capacity // least), splits)
        if sliding_window > 0:  # a window may begin within a split and end within another
            slots = min(-(-capacity // least), splits + 1, -(-(sliding_window + queries) // least) + 1)
        slots = max(slots, 1)
        workspace = (sequences, queries, heads, slots) if slots > 1 else (0,)
        parts = torch.empty(*workspace, width, dtype=torch.float32, device=q.device)
        maxima, sums = (torch.empty(workspace, dtype=torch.float32, device=q.device) for _ in range(2))
        cut = {"KEYS": tiling.keys, "SPLITS": splits, "LEAST": least, "QUERIES": queries, **common}
        decode_kernel[sequences, kv_heads, slots](
            out, parts, maxima, sums, *inputs, slots, *strides,
            KV_HEADS=kv_heads, GROUP=group, ROWS=tiling.rows, WIDE=wide, STAGES=tiling.stages, **cut,
            num_warps=tiling.warps, num_stages=tiling.stages, **FUSION,
        )  # fmt: skip
        if slots > 1:
            reduce_kernel[sequences, queries, heads](
                out, parts, maxima, sums, cu_seqlens_q, kv_lens, sliding_window, slots,
                HEADS=heads, CHUNK=REDUCE_SPLITS, **cut, num_warps=2, num_stages=1, **FUSION,
            )  # fmt: skip
    if longest > few:
        tiling = prefill_tiling(group, width, wide, fp8)
        tiles = rows // (tiling.rows // group) + sequences
        prefill_kernel[tiles, kv_heads](
            out, *inputs, sequences, *strides,
            KV_HEADS=kv_heads, GROUP=group, DECODE_QUERIES=few, ROWS=tiling.rows, KEYS=tiling.keys, WIDE=wide,
            STAGES=tiling.stages, **common, num_warps=tiling.warps, num_stages=tiling.stages, **FUSION,
        )  # fmt: skip
    return out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
) -> None:
    _, heads, width = q.shape
    _, kv_heads, block_size, cache_width = k_cache.shape
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q is {q.dtype}; paged attention takes float32, bfloat16 and float16")
    if k_cache.dtype not in CACHE_DTYPES:
        raise ValueError(f"k_cache is {k_cache.dtype}; it must be float32, bfloat16, float16 or float8_e4m3fn")
    if k_cache.dtype is not v_cache.dtype or k_cache.shape != v_cache.shape:
        raise ValueError("k_cache and v_cache must have one shape and dtype")
    if block_size != BLOCK_SIZE or cache_width != width or width not in HEAD_DIMS:
        raise ValueError(
            f"k_cache is {tuple(k_cache.shape)}; its blocks must hold 16 tokens of q's width, a multiple of 16 to 256"
        )
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise ValueError(f"q has {heads} heads; there must be 1 to {MAX_GROUP} for each of the {kv_heads} key heads")
    inner = (BLOCK_SIZE * width, width, 1)
    if k_cache.stride()[1:] != inner or v_cache.stride()[1:] != inner or q.stride(2) != 1:
        raise ValueError("k_cache and v_cache must be contiguous within a block, q within a head")
    for name, tensor in (("block_tables", block_tables), ("cu_seqlens_q", cu_seqlens_q), ("kv_lens", kv_lens)):
        if tensor.dtype is not torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be int32 with a contiguous last dimension")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
