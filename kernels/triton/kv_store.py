"""What lies between the product for q, k, v and attention on a GPU, in one launch.

    q, k, v <- q, k, v + LoRA sum                       (only where a LoRA term is given), rounded
    q, k    <- x / sqrt(mean(x**2) + eps) * weight      (only where norm weights are given), rounded twice, as rms_norm
    q, k    <- (a c - b s, b c + a s),  a, b the halves of x;  c, s = cos_sin[position].split(D/2), rounded
    k_cache[slot // 16, :, slot % 16] = k,  v_cache likewise; slot -1: skipped

`rope` alone and `kv_store` alone are the same kernel with less switched on. All of it is computed in float32 and
rounded to q's dtype wherever the separate operations would store it; from that to e4m3 where the caches are.

**Layout.** q, k, v [T, heads, D] with a stride between rows and one between heads, contiguous within a head: usually
views of one fused output. q is rotated in place; k and v, where they go to the caches, stay as they are. Caches in e4m3
are bytes to the kernel.

**Plan.** A program is a tile of rows by one head of q, k or v, as two halves [R, D/2], so that rotation needs no
exchange between threads. With a LoRA term the tiles are those of its routes. A row's bits do not depend on the others.

Bound: the bytes of q, read and written, of k and v, read once and written to the caches, and of the distinct pages of
B. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.kv_store import CACHE_DTYPES, FP8
from lorry.kernels.lora import LoraTerm
from lorry.kernels.nf4 import FLOAT_DTYPES
from lorry.kernels.triton.common import FUSION, rounded
from lorry.kernels.triton.fp8 import to_e4m3
from lorry.kernels.triton.lora import expand_arguments, expand_tile, output_vectors

TILE_ROWS = 16


@triton.jit(do_not_specialize=["linear", "rows", "slots", "max_position", "capacity", "pages"])
def qkv_finish_kernel(
    q, k, v, k_cache, v_cache, slot_mapping, positions, cos_sin, q_norm, k_norm, tiles, rows, slots, max_position, eps,
    q_row, q_head, k_row, k_head, v_row, v_head, k_block, v_block,
    arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features,
    LINEARS: tl.constexpr, SITES: tl.constexpr, SPLITS: tl.constexpr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, STORE: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, head); the heads are those of q, then of k, then, with STORE, of v."""
    head = tl.program_id(1)
    local = tl.arange(0, TILE_ROWS)
    if SITES > 0:
        tile = tiles + tl.program_id(0) * 3
        start, count, segment = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    else:
        start = tl.program_id(0) * TILE_ROWS
        count = rows - start
    if count <= 0:
        return
    row, row_mask = start + local, local < count
    column = tl.arange(0, HALF)
    column_mask = column < D // 2
    mask = row_mask[:, None] & column_mask[None, :]

    x, stride, site, first = q + head * q_head, q_row, 0, head
    if head >= Q_HEADS:
        x, stride, site, first = k + (head - Q_HEADS) * k_head, k_row, 1, head - Q_HEADS
    if STORE:  # noqa: SIM102, known at compile time
        if head >= Q_HEADS + KV_HEADS:
            first = head - Q_HEADS - KV_HEADS
            x, stride, site = v + first * v_head, v_row, 2
    dtype: tl.constexpr = q.dtype.element_ty
    place = x + row.to(tl.int64)[:, None] * stride + column[None, :]
    a = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(place + D // 2, mask=mask, other=0.0).to(tl.float32)

    if ROPE:  # all loads come before the LoRA sum, which takes its time
        turns = row_mask & (site < 2)
        position = tl.load(positions + row, mask=turns, other=0)
        known = mask & (turns & (position >= 0) & (position < max_position))[:, None]
        entry = cos_sin + position[:, None] * D + column[None, :]
        cos = tl.load(entry, mask=known, other=0.0)
        sin = tl.load(entry + D // 2, mask=known, other=0.0)
    if STORE:
        slot = tl.load(slot_mapping + row, mask=row_mask & (site > 0), other=-1)

    if SITES > 0:
        if segment >= 0:
            both = tl.arange(0, 2 * HALF)
            size = tl.where(site == 0, Q_HEADS * D, KV_HEADS * D)
            total = expand_tile(
                tl.zeros((TILE_ROWS, 2 * HALF), tl.float32), row, row_mask,
                first * D + both // HALF * (D // 2) + both % HALF, both % HALF < D // 2, segment, site, size,
                arena, page_offsets, page_scales, partial, linear, capacity, pages, in_features, LINEARS, SITES, SPLITS,
            )  # fmt: skip
            add_a, add_b = tl.split(tl.permute(tl.reshape(total, (TILE_ROWS, 2, HALF)), (0, 2, 1)))
            own = first * D + column
            gain, shift = output_vectors(
                own, column_mask, segment, site, size, arena, page_offsets, page_scales, linear, pages, LINEARS
            )
            a += gain[None, :] * a + shift[None, :] + add_a
            gain, shift = output_vectors(
                own + D // 2, column_mask, segment, site, size, arena, page_offsets, page_scales, linear, pages, LINEARS
            )
            b += gain[None, :] * b + shift[None, :] + add_b
        a, b = rounded(a, dtype).to(tl.float32), rounded(b, dtype).to(tl.float32)

    if ROPE:  # noqa: SIM102
        if site < 2:
            if NORM:
                weight = q_norm
                if site == 1:
                    weight = k_norm
                scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
                first_weight = tl.load(weight + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
                second_weight = tl.load(weight + D // 2 + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
                a = rounded(rounded(a * scale, dtype).to(tl.float32) * first_weight, dtype).to(tl.float32)
                b = rounded(rounded(b * scale, dtype).to(tl.float32) * second_weight, dtype).to(tl.float32)
            turned = a * cos - b * sin
            b = rounded(b * cos + a * sin, dtype).to(tl.float32)
            a = rounded(turned, dtype).to(tl.float32)

    if STORE:
        if site > 0:
            mask = mask & ((slot >= 0) & (slot < slots))[:, None]
            cache, block_stride = k_cache, k_block
            if site == 2:
                cache, block_stride = v_cache, v_block
            within = (first * 16 + slot % 16) * D
            there = cache + (slot // 16 * block_stride + within)[:, None] + column[None, :]
            tl.store(there, _stored(a, cache.dtype.element_ty), mask=mask)
            tl.store(there + D // 2, _stored(b, cache.dtype.element_ty), mask=mask)
        else:
            tl.store(place, rounded(a, dtype), mask=mask)
            tl.store(place + D // 2, rounded(b, dtype), mask=mask)
    else:
        tl.store(place, rounded(a, dtype), mask=mask)
        tl.store(place + D // 2, rounded(b, dtype), mask=mask)


@triton.jit
def _stored(values, dtype: tl.constexpr):
    if dtype == tl.uint8:
        return to_e4m3(values)
    else:
        return rounded(values, dtype)


def qkv_finish(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    lora: LoraTerm | None = None,
) -> Tensor:
    """As `lorry.kernels.kv_store.qkv_finish`. Raises ValueError for what the kernel does not serve."""
    rows, kv_heads, width = qkv.shape[0], k_cache.shape[1], k_cache.shape[3]
    if qkv.shape[1] % width or qkv.shape[1] <= 2 * kv_heads * width:
        raise ValueError(f"qkv is {list(qkv.shape)}; its columns must be (Hq + 2 * {kv_heads}) * {width}")
    heads = qkv.view(rows, qkv.shape[1] // width, width)
    q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    if rows:
        _launch(q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps, lora)
    return q


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """As `lorry.kernels.rope.rope`, but a position outside cos_sin makes its row zeros."""
    if q.shape[0]:
        _launch(q, k, None, positions, cos_sin)


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """As `lorry.kernels.kv_store.kv_store`, but a slot outside the caches is skipped."""
    if k.shape[0]:
        _launch(None, k, v, None, None, k_cache, v_cache, slot_mapping)


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    lora: LoraTerm | None = None,
) -> None:
    """Absent q: nothing but the store; absent caches: nothing but the rotation, of k in place too."""
    rows, kv_heads, width = k.shape
    _check(k, width, [x for x in (q, k, v) if x is not None], [c for c in (k_cache, v_cache) if c is not None])
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together")
    if cos_sin is not None and (cos_sin.dtype is not torch.float32 or not cos_sin.is_contiguous()):
        raise ValueError("cos_sin must be float32 and contiguous")
    positions, slot_mapping = (x if x is None else x.contiguous() for x in (positions, slot_mapping))
    if k_cache is not None and v_cache is not None and k_cache.dtype is FP8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    blocks = 0 if k_cache is None else k_cache.shape[0]
    q_heads = 0 if q is None else q.shape[1]
    if lora is None:
        tile_rows, tiles, count = TILE_ROWS, None, triton.cdiv(rows, TILE_ROWS)
    else:
        tile_rows, tiles, count = lora.routes.tile_rows, lora.routes.tiles, lora.routes.tile_count
    qkv_finish_kernel[count, q_heads + kv_heads + (0 if v is None else kv_heads)](
        k if q is None else q, k, k if v is None else v, k_cache, v_cache, slot_mapping, positions, cos_sin,
        q_norm, k_norm, tiles, rows, blocks * 16, 0 if cos_sin is None else cos_sin.shape[0], eps,
        *(k if q is None else q).stride()[:2], *k.stride()[:2], *(k if v is None else v).stride()[:2],
        0 if k_cache is None else k_cache.stride(0), 0 if v_cache is None else v_cache.stride(0),
        **expand_arguments(lora), Q_HEADS=q_heads, KV_HEADS=kv_heads, D=width,
        HALF=max(16, triton.next_power_of_2(width // 2)), ROPE=positions is not None, NORM=q_norm is not None,
        STORE=k_cache is not None, TILE_ROWS=tile_rows, num_warps=4, num_stages=1, **FUSION,
    )  # fmt: skip


def _check(k: Tensor, width: int, inputs: list[Tensor], caches: list[Tensor]) -> None:
    for x in inputs:
        if x.dtype not in FLOAT_DTYPES or x.dtype is not k.dtype:
            raise ValueError(f"q, k and v must have one dtype, float32, bfloat16 or float16, not {x.dtype}")
        if x.stride(2) != 1 or width % 2:
            raise ValueError("heads must be contiguous and of even width")
    if len({cache.dtype for cache in caches}) > 1:
        raise ValueError(f"both caches must have one dtype, not {[cache.dtype for cache in caches]}")
    for cache in caches:
        if cache.dtype not in CACHE_DTYPES:
            raise ValueError(f"caches must be float32, bfloat16, float16 or float8_e4m3fn, not {cache.dtype}")
        if cache.shape[2] != 16 or cache.stride()[1:] != (16 * width, width, 1):
            raise ValueError("caches must be [num_blocks, Hk, 16, D], contiguous within a block")
