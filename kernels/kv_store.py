"""The paged KV cache in memory, and the scatter of new keys and values into it.

k_cache[slot // B, :, slot % B] = k[t],  v_cache likewise,  slot = slot_mapping[t],  slot -1: skipped

Caches are float32, bfloat16, float16 or e4m3 (float8_e4m3fn). Stores round to the nearest, ties to even; e4m3 has no
infinity: what lies beyond ±448 becomes ±448, and NaN stays NaN.

`qkv_finish` is that and all that comes between the product for q, k, v and the scatter.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from lorry.kernels import dispatch, native
from lorry.kernels.lora import LoraTerm
from lorry.kernels.nf4 import FLOAT_DTYPES
from lorry.kernels.rms_norm import rms_norm, rms_norm_reference
from lorry.kernels.rope import rope, rope_reference

FP8 = torch.float8_e4m3fn
CACHE_DTYPES = (*FLOAT_DTYPES, FP8)


def empty_caches(
    num_blocks: int, heads: int, block_size: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Zeroed keys and values, [num_blocks, Hk, B, D] each.

    On the CPU the keys are a view whose tokens of one dimension lie side by side, as [num_blocks, Hk, D, B]: one
    vector is one dimension of 16 tokens. The CPU kernels take no other; the references take any. A page of memory is
    taken from the system when its first token is written.
    """
    shape = (num_blocks, heads, block_size, width)
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    keys, values = (_untouched_zeros(math.prod(shape), dtype) for _ in range(2))
    return keys.view(num_blocks, heads, width, block_size).transpose(2, 3), values.view(shape)


def _untouched_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros on which nothing was spent yet: the system hands them out page by page, in large pages where it can."""
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.zeros(0, dtype=dtype)


def fits_kernels(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the CPU kernels take these caches."""
    return (
        k_cache.is_cpu
        and k_cache.dtype is v_cache.dtype
        and k_cache.dtype in native.CACHE_TYPES
        and k_cache.transpose(2, 3).is_contiguous()
        and v_cache.is_contiguous()
    )


def as_bits(cache: Tensor) -> Tensor:
    """The same memory as uint8 where it holds e4m3, for which torch lacks operations that only move bytes."""
    return cache.view(torch.uint8) if cache.dtype is FP8 else cache


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(FP8).max
    return (x.clamp(-largest, largest) if dtype is FP8 else x).to(dtype)


def kv_store_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot // B, :, slot % B] = k[t], v_cache likewise; rows of slot -1 are skipped."""
    rows = (slot_mapping >= 0).nonzero().view(-1)
    slots = slot_mapping[rows]
    block_size = k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    for x, cache in ((k, k_cache), (v, v_cache)):
        as_bits(cache)[block, :, offset] = as_bits(_rounded(x[rows], cache.dtype))


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot // B, :, slot % B] = k[t], v_cache likewise.

    k, v: [T, Hk, D], strided views allowed (last dimension contiguous); caches: as `empty_caches` makes them, in the
    KV dtype, to which values are rounded as above; slot_mapping: int64 [T], block * B + offset, or -1 to skip the row.
    Two rows of one call must not share a slot. Raises IndexError for a slot outside the caches; a GPU skips its row.
    """
    if dispatch.on_gpu(k):
        from lorry.kernels.triton import kv_store as gpu

        gpu.kv_store(k, v, k_cache, v_cache, slot_mapping)
        return
    library = native.library()
    if library is None or not _fits(k, v, k_cache, v_cache):
        kv_store_reference(k, v, k_cache, v_cache, slot_mapping)
        return
    blocks, heads, block_size, width = k_cache.shape
    k_strides, v_strides = k.stride(), v.stride()
    slot_mapping = slot_mapping.contiguous()
    status = library.kv_store(
        k.data_ptr(),
        k_strides[0],
        k_strides[1],
        v.data_ptr(),
        v_strides[0],
        v_strides[1],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        native.CACHE_TYPES[k_cache.dtype],
        blocks,
        heads,
        block_size,
        width,
        slot_mapping.data_ptr(),
        k.shape[0],
    )
    if status:
        raise IndexError(f"slot_mapping must lie in -1..{blocks * block_size - 1}")


def qkv_finish_reference(
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
) -> Tensor:
    """rms_norm of the heads of q and k, rope, kv_store; as in `qkv_finish`."""
    q, k, v = _split(qkv, k_cache)
    rotated = q if q_norm is None else rms_norm_reference(q, q_norm, eps)
    k = k if k_norm is None else rms_norm_reference(k, k_norm, eps)
    q.copy_(rope_reference(rotated, positions, cos_sin))
    kv_store_reference(rope_reference(k, positions, cos_sin), v, k_cache, v_cache, slot_mapping)
    return q


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
    """q, k = rope(rms_norm(q)), rope(rms_norm(k));  k_cache[slot // B, :, slot % B] = k[t],  v_cache likewise.

    qkv: [T, (Hq + 2 Hk) * D], any stride between rows; q in it is rotated in place, k and v are left in no defined
    state; positions: int64 [T]; cos_sin: float32 [max_pos, D], as in `rope`; caches and slot_mapping: as in `kv_store`;
    q_norm, k_norm: [D], given together or not at all. lora: on a GPU, the LoRA sums of (q, k, v) that are still to be
    added, their shrink done. Returns q, a view [T, Hq, D] of qkv. Raises IndexError for a position outside cos_sin and
    for a slot outside the caches; a GPU writes zeros and skips the row.
    """
    if dispatch.on_gpu(qkv):
        from lorry.kernels.triton import kv_store as gpu

        return gpu.qkv_finish(
            qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, q_norm=q_norm, k_norm=k_norm, eps=eps, lora=lora
        )
    assert lora is None, "only a GPU kernel finishes a LoRA sum"
    q, k, v = _split(qkv, k_cache)
    if q_norm is not None and k_norm is not None:
        q.copy_(rms_norm(q, q_norm, eps))
        k.copy_(rms_norm(k, k_norm, eps))
    rope(q, k, positions, cos_sin)
    kv_store(k, v, k_cache, v_cache, slot_mapping)
    return q


def _split(qkv: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, Hq, D], [T, Hk, D] and [T, Hk, D]."""
    _, kv_heads, _, width = k_cache.shape
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // width, width)
    return heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]


def _fits(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    return (
        k.dtype is torch.float32
        and v.dtype is torch.float32
        and k.is_cpu
        and k.stride()[2] == 1
        and v.stride()[2] == 1
        and fits_kernels(k_cache, v_cache)
    )
