"""Find the KV blocks of a prompt that was computed before.

A full block is found by an exact chain: (what precedes it, its BLOCK_SIZE tokens). What precedes the first block is
the namespace: the adapters with revision and weight, and the cache salt; keys and values depend on all of them, and
nothing may be found across them. What precedes any other block is the node of the block before it. Nodes are numbered
and a number is never used twice, so a chain whose middle was reused for other content is simply not found; no hash can
collide.

Adapters that act from a later token on leave the base's keys and values before it, and share them:

    base ─▶ block ─▶ block ─▶ (node, namespace with `start`) ─▶ block that holds `start` ─▶ block
                        └───▶ block of the base
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that keys and values depend on beside the tokens, and the salt that separates clients."""

    adapters: tuple[tuple[str, str, float], ...] = ()  # (id, revision, weight) in the request's order
    cache_salt: str = ""
    start: int = 0  # token from which the adapters act; those before it are the base's

    def before(self, block: int, node: Node) -> Node:
        """What precedes a sequence's block of that number, whose predecessor has `node` (which the first has not)."""
        own = self.start // BLOCK_SIZE
        if block == 0:
            return self if own == 0 else Namespace(cache_salt=self.cache_salt)
        return (node, self) if block == own else node


Node = Namespace | int | tuple["Node", Namespace]
_Key = tuple[Node, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Match:
    """The blocks that were found, in order, and the node after the last of them."""

    blocks: list[int]
    node: Node


class PrefixIndex:
    """Full blocks by content. Held blocks are found as well as reusable ones; void ones never."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        allocator.on_reuse = self._forget
        self._nodes: dict[_Key, tuple[int, int]] = {}  # → (node, block)
        self._keys: dict[int, _Key] = {}  # block → its key
        self._next_node = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, namespace: Namespace, token_ids: Sequence[int]) -> Match:
        """The longest chain of full blocks that starts `token_ids`. Takes no reference: share the blocks at once."""
        node: Node = namespace
        blocks: list[int] = []
        for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
            parent = namespace.before(len(blocks), node)
            found = self._nodes.get((parent, tuple(token_ids[start : start + BLOCK_SIZE])))
            if found is None:
                break
            node = found[0]
            blocks.append(found[1])
        return Match(blocks, node)

    def insert(self, parent: Node, token_ids: Sequence[int], block: int) -> Node:
        """Make the held, full, computed `block` findable after `parent`, see `Namespace.before`; returns its node.

        When equal content is known already the known block stays the one that is found.
        """
        assert len(token_ids) == BLOCK_SIZE
        key = (parent, tuple(token_ids))
        known = self._nodes.get(key)
        if known is not None:
            return known[0]
        if block in self._keys:  # found under a chain whose head was reused meanwhile
            del self._nodes[self._keys[block]]
        node = self._next_node
        self._next_node += 1
        self._nodes[key] = (node, block)
        self._keys[block] = key
        self._allocator.keep(block)
        return node

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._nodes[key]

    def check(self) -> None:
        """Prove that blocks and keys are one to one."""
        assert len(self._nodes) == len(self._keys)
        for block, key in self._keys.items():
            assert self._nodes[key][1] == block, f"block {block} is found under another key"
