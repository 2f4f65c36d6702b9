"""The tensors behind the blocks: keys and values of every layer, in pages of BLOCK_SIZE tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.kernels.kv_store import as_bits, empty_caches
from lorry.kernels.transfer import to_device
from lorry.server.cache.block_table import Copy
from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for

FREE_MEMORY_SHARE = 0.3


def block_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block, keys and values of all layers together."""
    return 2 * layers * kv_heads * BLOCK_SIZE * head_dim * dtype.itemsize


def choose_num_blocks(
    bytes_per_block: int, kv_memory: int | None, free_memory: int, max_running: int, context_length: int
) -> int:
    """Blocks to allocate: what `kv_memory` bytes hold, or a share of the free memory when it is None.

    No more than `max_running` sequences of full context can ever use, and at least one.
    """
    budget = int(free_memory * FREE_MEMORY_SHARE) if kv_memory is None else kv_memory
    return max(1, min(budget // bytes_per_block, max_running * blocks_for(context_length)))


class KVCache:
    """keys[layer], values[layer]: [num_blocks, kv_heads, BLOCK_SIZE, head_dim] in `dtype`, zeroed.

    Zeroed, since kernels multiply what stands behind a sequence's last token in its block before they drop it: numbers
    left in that memory may be subnormal, and products with these are slow. That is the likely, not a proved cause of a
    test that took minutes without (docs/log.md).
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.dtype = dtype
        caches = [empty_caches(num_blocks, kv_heads, BLOCK_SIZE, head_dim, dtype, device) for _ in range(layers)]
        self.keys: list[Tensor] = [keys for keys, _ in caches]
        self.values: list[Tensor] = [values for _, values in caches]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def copy_blocks(self, copies: Sequence[Copy]) -> None:
        """cache[destination] = cache[source] for all pairs at once: every source is read before anything is written."""
        if not copies:
            return
        sources, targets = to_device([np.array(copies).T.copy()], self.keys[0].device)[0]
        for tensor in map(as_bits, (*self.keys, *self.values)):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))
