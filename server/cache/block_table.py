"""One sequence's blocks: token i lies in block `blocks[i // 16]` at offset i % 16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator, blocks_for

Copy = tuple[int, int]  # source block, destination block


class BlockTable:
    """The blocks that one sequence holds, as a list and as the int32 row that the attention kernel reads.

    Forks share all blocks. Whoever writes into a shared block first gets a copy of it (copy-on-write): `prepare`
    returns the copies that the device has to make before the step that writes.
    """

    __slots__ = ("_allocator", "_row", "blocks")

    def __init__(self, allocator: BlockAllocator, blocks: Sequence[int] = ()) -> None:
        """Take over `blocks`, of which the caller already holds one reference each."""
        self._allocator = allocator
        self.blocks: list[int] = []
        self._row: npt.NDArray[np.int32] = np.zeros(8, np.int32)
        self._extend(blocks)

    @property
    def row(self) -> npt.NDArray[np.int32]:
        """int32 [len(blocks)]; a view, valid until the table changes."""
        return self._row[: len(self.blocks)]

    def cost(self, start: int, end: int) -> int:
        """Blocks that `prepare(start, end)` would allocate: new ones, and copies of shared ones."""
        held, needed = len(self.blocks), blocks_for(end)
        written = self.blocks[start // BLOCK_SIZE : needed]
        return self._allocator.count_shared(written) + max(0, needed - held)

    def prepare(self, start: int, end: int) -> list[Copy]:
        """Make tokens [start, end) writable by this sequence alone.

        Returns (source, destination) pairs of blocks whose content has to be copied first. Raises OutOfBlocks and
        changes nothing when blocks are short.
        """
        fresh = self._allocator.allocate(self.cost(start, end))
        copies: list[Copy] = []
        for i in range(start // BLOCK_SIZE, min(blocks_for(end), len(self.blocks))):
            if self._allocator.references(self.blocks[i]) > 1:
                source, target = self.blocks[i], fresh.pop()
                self._allocator.release([source])
                self.blocks[i] = self._row[i] = target
                copies.append((source, target))
        self._extend(fresh)
        return copies

    def fork(self) -> BlockTable:
        """A second table over the same blocks; no content is copied until one of the two writes."""
        self._allocator.share(self.blocks)
        return BlockTable(self._allocator, self.blocks)

    def release(self) -> None:
        """Give all blocks back; the table is empty afterwards."""
        self._allocator.release(self.blocks)
        self.blocks = []

    def _extend(self, blocks: Sequence[int]) -> None:
        start, end = len(self.blocks), len(self.blocks) + len(blocks)
        if end > len(self._row):
            grown = np.zeros(max(end, 2 * len(self._row)), np.int32)
            grown[:start] = self._row[:start]
            self._row = grown
        self._row[start:end] = blocks
        self.blocks.extend(blocks)
