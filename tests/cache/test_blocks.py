"""Reference counts, copy-on-write and reuse, by random programs against a model of what each table must hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lorry.server.cache.block_table import BlockTable
from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator, OutOfBlocks, blocks_for
from lorry.server.cache.prefix import Namespace, PrefixIndex


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (31, 2), (32, 2), (33, 3)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks


def test_allocate_takes_nothing_when_short() -> None:
    allocator = BlockAllocator(3)
    held = allocator.allocate(2)
    with pytest.raises(OutOfBlocks):
        allocator.allocate(2)
    assert allocator.available == 1
    allocator.check([held])


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockAllocator(0)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_fork_copies_only_a_shared_partial_block(length: int) -> None:
    allocator = BlockAllocator(9)
    parent = BlockTable(allocator)
    parent.prepare(0, length)
    child = parent.fork()
    assert child.blocks == parent.blocks

    partial = length % BLOCK_SIZE != 0
    assert child.cost(length, length + 1) == 1
    copies = child.prepare(length, length + 1)
    assert copies == ([(parent.blocks[-1], child.blocks[-1])] if partial else [])
    assert child.blocks[: length // BLOCK_SIZE] == parent.blocks[: length // BLOCK_SIZE]
    assert set(parent.blocks[length // BLOCK_SIZE :]).isdisjoint(child.blocks[length // BLOCK_SIZE :])
    assert parent.cost(length, length + 1) == (0 if partial else 1)
    assert parent.prepare(length, length + 1) == []  # alone again, or a new block
    assert child.row.tolist() == child.blocks
    allocator.check([parent.blocks, child.blocks])
    parent.release()
    child.release()
    assert allocator.available == 9
    allocator.check([])


def test_reusable_blocks_go_last_and_the_tail_before_the_head() -> None:
    allocator = BlockAllocator(4)
    index = PrefixIndex(allocator)
    table = BlockTable(allocator)
    table.prepare(0, 48)
    node: Namespace | int = Namespace()
    for number, block in enumerate(table.blocks):
        node = index.insert(node, [number] * BLOCK_SIZE, block)
    head, middle, tail = table.blocks
    table.release()
    assert allocator.available == 4
    first, second = allocator.allocate(2)
    assert first not in (head, middle, tail)
    assert second == tail
    tokens = [number for number in range(3) for _ in range(BLOCK_SIZE)]
    assert index.match(Namespace(), tokens).blocks == [head, middle]
    allocator.check([[first, second]])
    index.check()


class Blocks(RuleBasedStateMachine):
    """Tables of tokens: each writes its own tokens; content follows copies; nobody's content may change."""

    @initialize(num_blocks=st.integers(1, 13))
    def start(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.index = PrefixIndex(self.allocator)
        self.memory: dict[tuple[int, int], int] = {}  # (block, offset) → token
        self.tables: list[BlockTable] = []
        self.tokens: list[list[int]] = []
        self.spaces: list[int] = []

    @rule(space=st.integers(0, 1), token=st.integers(0, 1), count=st.integers(1, 40))
    def new(self, space: int, token: int, count: int) -> None:
        tokens = [token] * count
        match = self.index.match(Namespace(cache_salt=str(space)), tokens[:-1])
        self.allocator.share(match.blocks)
        self.tables.append(BlockTable(self.allocator, match.blocks))
        self.tokens.append(tokens[: len(match.blocks) * BLOCK_SIZE])
        self.spaces.append(space)
        self._write(len(self.tables) - 1, tokens[len(match.blocks) * BLOCK_SIZE :])

    @rule(which=st.integers(0, 99), token=st.integers(0, 1), count=st.integers(1, 18))
    def grow(self, which: int, token: int, count: int) -> None:
        if self.tables:
            self._write(which % len(self.tables), [token] * count)

    @rule(which=st.integers(0, 99))
    def fork(self, which: int) -> None:
        if self.tables:
            which %= len(self.tables)
            self.tables.append(self.tables[which].fork())
            self.tokens.append(list(self.tokens[which]))
            self.spaces.append(self.spaces[which])

    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        if self.tables:
            which %= len(self.tables)
            self.tables.pop(which).release()
            self.tokens.pop(which)
            self.spaces.pop(which)

    def _write(self, which: int, tokens: list[int]) -> None:
        table, known = self.tables[which], self.tokens[which]
        start, end = len(known), len(known) + len(tokens)
        cost, available = table.cost(start, end), self.allocator.available
        try:
            copies = table.prepare(start, end)
        except OutOfBlocks:
            assert cost > available
            return
        assert self.allocator.available == available - cost
        read = {source: [self.memory.get((source, i)) for i in range(BLOCK_SIZE)] for source, _ in copies}
        for source, target in copies:
            for i, value in enumerate(read[source]):
                self.memory[target, i] = -1 if value is None else value
        for position, token in enumerate(tokens, start):
            block = table.blocks[position // BLOCK_SIZE]
            assert self.allocator.references(block) == 1, "a shared block is written"
            self.memory[block, position % BLOCK_SIZE] = token
        known += tokens
        node: Namespace | int = Namespace(cache_salt=str(self.spaces[which]))
        for i in range(len(known) // BLOCK_SIZE):
            node = self.index.insert(node, known[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE], table.blocks[i])

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check(table.blocks for table in self.tables)
        self.index.check()
        for table, tokens in zip(self.tables, self.tokens, strict=True):
            assert table.row.tolist() == table.blocks
            held = [self.memory[table.blocks[i // BLOCK_SIZE], i % BLOCK_SIZE] for i in range(len(tokens))]
            assert held == tokens


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    known=st.lists(st.integers(0, 1), max_size=70),
    asked=st.lists(st.integers(0, 1), max_size=70),
    same_space=st.booleans(),
)
def test_match_is_the_longest_common_run_of_full_blocks(known: list[int], asked: list[int], same_space: bool) -> None:
    allocator = BlockAllocator(9)
    index = PrefixIndex(allocator)
    space = Namespace((("pirate", "r1", 1.0),), "salt")
    blocks = allocator.allocate(len(known) // BLOCK_SIZE)
    node: Namespace | int = space
    for i, block in enumerate(blocks):
        node = index.insert(node, known[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE], block)
    other = space if same_space else Namespace((("pirate", "r1", 0.5),), "salt")
    common = 0
    while (
        same_space
        and common < len(blocks)
        and (common + 1) * BLOCK_SIZE <= len(asked)
        and known[: (common + 1) * BLOCK_SIZE] == asked[: (common + 1) * BLOCK_SIZE]
    ):
        common += 1
    assert index.match(other, asked).blocks == blocks[:common]


@pytest.mark.parametrize(
    "other",
    [
        Namespace(),
        Namespace((("a", "1", 1.0),), "other"),
        Namespace((("a", "2", 1.0),), "s"),
        Namespace((("b", "1", 1.0),), "s"),
        Namespace((("a", "1", 0.5),), "s"),
        Namespace((("a", "1", 1.0), ("b", "1", 1.0)), "s"),
    ],
)
def test_nothing_is_found_across_namespaces(other: Namespace) -> None:
    allocator = BlockAllocator(3)
    index = PrefixIndex(allocator)
    tokens = list(range(BLOCK_SIZE))
    index.insert(Namespace((("a", "1", 1.0),), "s"), tokens, allocator.allocate()[0])
    assert index.match(other, tokens).blocks == []
    assert len(index.match(Namespace((("a", "1", 1.0),), "s"), tokens).blocks) == 1
