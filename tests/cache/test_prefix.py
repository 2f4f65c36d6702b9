"""Blocks of adapters that act from a later token on: those before it are the base's, nobody else's is ever found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator
from lorry.server.cache.prefix import Namespace, Node, PrefixIndex

A, B = (("a", "1", 1.0),), (("b", "1", 1.0),)
EDGES = (0, 1, 15, 16, 17, 31, 32, 33)
NAMESPACES = st.builds(
    lambda adapters, salt, start: Namespace(adapters, salt, start if adapters else 0),
    st.sampled_from([(), A, B, (("a", "1", 0.5),)]),
    st.sampled_from(["", "", "salt"]),
    st.sampled_from([*EDGES, 40]),
)


def keep(index: PrefixIndex, namespace: Namespace, tokens: list[int], blocks: list[int]) -> None:
    node: Node = namespace
    for number, block in enumerate(blocks):
        held = tokens[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
        node = index.insert(namespace.before(number, node), held, block)


@pytest.mark.parametrize("start", EDGES)
def test_blocks_before_the_start_are_found_by_the_base_and_found_of_it(start: int) -> None:
    tokens, own = list(range(48)), Namespace(A, "s", start)
    spaces = [own, Namespace((), "s"), Namespace(B, "s", start), Namespace(A, "s", start + 1), Namespace(A, "t", start)]
    for keeper in (own, spaces[1]):
        allocator = BlockAllocator(3)
        index = PrefixIndex(allocator)
        keep(index, keeper, tokens, allocator.allocate(3))
        shared = start // BLOCK_SIZE
        later = (start + 1) // BLOCK_SIZE
        of_own = [3, shared, shared, shared, 0]
        of_base = [shared, 3, shared, later, 0]
        expected = of_own if keeper is own else of_base
        assert [len(index.match(space, tokens).blocks) for space in spaces] == expected
        index.check()


def test_adapters_that_begin_at_two_tokens_of_one_block_share_nothing_of_it() -> None:
    """The same tokens to the end of the block: what follows decides which match was the last."""
    allocator = BlockAllocator(2)
    index = PrefixIndex(allocator)
    tokens = list(range(32))
    keep(index, Namespace(A, "", 18), tokens, allocator.allocate(2))
    assert len(index.match(Namespace(A, "", 18), tokens).blocks) == 2
    assert len(index.match(Namespace(A, "", 30), tokens).blocks) == 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMESPACES, st.lists(st.integers(0, 1), min_size=3, max_size=3)), min_size=1, max_size=9))
def test_what_is_found_is_exactly_what_was_computed_alike(sequences: list[tuple[Namespace, list[int]]]) -> None:
    """A block's content is its tokens, those before it, and what each of them used."""
    allocator = BlockAllocator(3 * len(sequences))
    index = PrefixIndex(allocator)
    contents: dict[int, object] = {}
    for namespace, numbers in sequences:
        tokens = [number for number in numbers for _ in range(BLOCK_SIZE)]
        used = [
            (token, namespace.adapters if at >= namespace.start else (), namespace.cache_salt)
            for at, token in enumerate(tokens)
        ]
        wanted = [tuple(used[: (number + 1) * BLOCK_SIZE]) for number in range(len(numbers))]
        found = index.match(namespace, tokens).blocks
        assert [contents[block] for block in found] == wanted[: len(found)]
        assert len(found) == len(wanted) or wanted[len(found)] not in contents.values()
        allocator.share(found)
        blocks = found + allocator.allocate(len(numbers) - len(found))
        keep(index, namespace, tokens, blocks)
        contents |= dict(zip(blocks, wanted, strict=True))
        index.check()
