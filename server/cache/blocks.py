"""Who holds which block of the KV cache: reference counts, without the tensors.

A block is BLOCK_SIZE consecutive tokens of keys and values, of all layers. It is in exactly one of three states:

    free        nobody holds it, its content is void
    held        references >= 1: that many block tables contain it
    reusable    nobody holds it, but the prefix index can still find its content; oldest first out

`allocate` takes free blocks, then the reusable ones that were released longest ago.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

BLOCK_SIZE = 16


class OutOfBlocks(Exception):
    """Fewer blocks are available than were asked for; nothing was taken."""


def blocks_for(tokens: int) -> int:
    """Blocks that `tokens` tokens occupy: ⌈tokens / BLOCK_SIZE⌉."""
    return -(-tokens // BLOCK_SIZE)


class BlockAllocator:
    """Reference counts of `num_blocks` blocks, ids 0 … num_blocks - 1.

    `on_reuse(block)` is called when a reusable block is handed out again, so that its content is found no more.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None] | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; at least 1 block is needed")
        self.num_blocks = num_blocks
        self.on_reuse = on_reuse
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._findable: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now: free or reusable."""
        return len(self._free) + len(self._reusable)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.available

    def references(self, block: int) -> int:
        return self._references[block]

    def count_shared(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have more than one holder."""
        return sum(self._references[block] > 1 for block in blocks)

    def allocate(self, count: int = 1) -> list[int]:
        """Hand out `count` blocks with one reference each; raises OutOfBlocks and takes nothing if they are short."""
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks asked for, {self.available} of {self.num_blocks} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._reusable.popitem(last=False)
                self.forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; a reusable one is held again."""
        for block in blocks:
            assert self._references[block] > 0 or block in self._reusable, f"block {block} is void"
            self._references[block] += 1
            self._reusable.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block, the last first, so that the tail of a prefix is reused before its head."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released more often than it is held"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._findable:
                    self._reusable[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """From now on the held `block` becomes reusable, not free, when its last holder releases it."""
        assert self._references[block] > 0, f"block {block} is not held"
        self._findable.add(block)

    def forget(self, block: int) -> None:
        """Undo `keep`: the content of `block` is found no more."""
        self._findable.discard(block)
        if block in self._reusable:
            del self._reusable[block]
            self._free.append(block)
        if self.on_reuse is not None:
            self.on_reuse(block)

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Prove that every block is in exactly one state and, given all block tables, that counts equal holders."""
        free, reusable = set(self._free), set(self._reusable)
        held = {block for block, count in enumerate(self._references) if count > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & reusable or free & held or reusable & held), "a block is in two states"
        assert free | reusable | held == set(range(self.num_blocks)), "a block is lost"
        assert min(self._references) >= 0, "a reference count is negative"
        assert reusable <= self._findable, "a reusable block cannot be found"
        assert self._findable <= reusable | held, "a free block can be found"
        if tables is not None:
            holders = Counter(block for table in tables for block in table)
            counts = {block: self._references[block] for block in held}
            assert dict(holders) == counts, "reference counts differ from the block tables"
