"""Scatter of new keys and values into the paged KV cache.

    k_cache[slot // B, :, slot % B] = k[t],  v_cache likewise,  slot = slot_mapping[t],  slot -1: skipped
"""

from __future__ import annotations

from torch import Tensor


def kv_store_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot // B, :, slot % B] = k[t], v_cache likewise; rows of slot -1 are skipped."""
    rows = (slot_mapping >= 0).nonzero().view(-1)
    slots = slot_mapping[rows]
    block_size = k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k[rows].to(k_cache.dtype)
    v_cache[block, :, offset] = v[rows].to(v_cache.dtype)


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """k_cache[slot // B, :, slot % B] = k[t], v_cache likewise.

    k, v: [T, Hk, D], strided views allowed (last dimension contiguous); caches: [num_blocks, Hk, B, D] in the
    KV dtype, to which values are rounded; slot_mapping: int64 [T], block * B + offset, or -1 to skip the row.
    Two rows of one call must not share a slot.
    """
    kv_store_reference(k, v, k_cache, v_cache, slot_mapping)
