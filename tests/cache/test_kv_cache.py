"""Sizes of the KV tensors, and copies that read every source before anything is written."""

from __future__ import annotations

import pytest
import torch

from lorry.server.cache.kv_cache import KVCache, block_bytes, choose_num_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_copies_happen_at_once(dtype: torch.dtype) -> None:
    kv = KVCache(layers=2, kv_heads=3, head_dim=5, num_blocks=7, dtype=dtype)
    for layer, tensor in enumerate((*kv.keys, *kv.values)):
        tensor[:] = torch.arange(7)[:, None, None, None] * 2.0**layer
    kv.copy_blocks([(1, 2), (2, 3), (1, 5)])
    for layer, tensor in enumerate((*kv.keys, *kv.values)):
        content = tensor[:, 2, 11, 4].float() / 2**layer
        assert content.tolist() == [0, 1, 1, 2, 4, 1, 6]


def test_bytes() -> None:
    kv = KVCache(layers=3, kv_heads=5, head_dim=7, num_blocks=11, dtype=torch.bfloat16)
    assert kv.nbytes == 11 * block_bytes(3, 5, 7, torch.bfloat16)
    assert kv.keys[0].shape == (11, 5, 16, 7) and len(kv.values) == 3


def test_e4m3_doubles_the_blocks() -> None:
    halves, bytes = (block_bytes(3, 5, 64, dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    assert choose_num_blocks(bytes, 1 << 20, 0, 999, 999) == 2 * choose_num_blocks(halves, 1 << 20, 0, 999, 999) == 34
    assert KVCache(3, 5, 64, 11, torch.float8_e4m3fn).nbytes == 11 * bytes


@pytest.mark.parametrize(
    ("kv_memory", "free", "expected"),
    [(1000, 0, 10), (1099, 0, 10), (None, 1000, 3), (10**9, 0, 6 * 5), (1, 10**9, 1)],
)
def test_number_of_blocks(kv_memory: int | None, free: int, expected: int) -> None:
    assert choose_num_blocks(100, kv_memory, free, max_running=6, context_length=65) == expected
