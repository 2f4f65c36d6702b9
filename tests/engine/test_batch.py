"""Indices of the flat batch at block boundaries ± 1, against the definition written token by token."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.adapters.segments import build_segments
from lorry.server.cache.block_table import BlockTable
from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator
from lorry.server.cache.prefix import Namespace
from lorry.server.engine.batch import Batch, build_batch, combo_runs
from lorry.server.engine.messages import Generate, SamplingParams, StoppingParams
from lorry.server.engine.plan import Piece
from lorry.server.engine.sequence import Combo, Request, Sequence

EDGES = (1, 15, 16, 17, 31, 32, 33)


def piece(
    allocator: BlockAllocator,
    prompt: int,
    output: int,
    start: int,
    end: int,
    *,
    combo: Combo = (),
    begins: int = 0,
    score_from: int | None = None,
) -> Piece:
    tokens = [1000 * prompt + i for i in range(prompt)]
    message = Generate("r", tokens, SamplingParams(), StoppingParams(9), prompt_logprobs_from=score_from)
    request = Request(message, 0)
    request.combo = combo
    request.namespace = Namespace((("a", "1", 1.0),), "", begins)
    sequence = Sequence(request, 0, BlockTable(allocator))
    sequence.output = [-1 - i for i in range(output)]
    sequence.table.prepare(0, sequence.length)
    random.Random(prompt).shuffle(sequence.table.blocks)
    sequence.table.row[:] = sequence.table.blocks
    sequence.computed = start
    return Piece(sequence, start, end)


def assert_is_defined(batch: Batch, pieces: list[Piece]) -> None:
    """Token by token, from the definition in the module's docstring."""
    inputs = batch.inputs
    tokens, positions, slots, lasts = [], [], [], []
    for s, each in enumerate(pieces):
        text = each.sequence.request.prompt + each.sequence.output
        for position in range(each.start, each.end):
            tokens.append(text[position])
            positions.append(position)
            block = each.sequence.table.blocks[position // BLOCK_SIZE]
            slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        needed = -(-each.end // BLOCK_SIZE)
        assert inputs.block_tables[s, :needed].tolist() == each.sequence.table.blocks[:needed]
        if each.end == len(text):
            lasts.append(len(tokens) - 1)
    assert inputs.token_ids.tolist() == tokens
    assert inputs.positions.tolist() == positions
    assert inputs.slot_mapping.tolist() == slots
    lengths = [each.end - each.start for each in pieces]
    assert inputs.cu_seqlens_q.tolist() == [0, *itertools.accumulate(lengths)]
    assert inputs.kv_lens.tolist() == [each.end for each in pieces]
    assert inputs.logits_rows[: len(batch.deciding)].tolist() == lasts
    assert [each.end for each in batch.deciding] == [each.sequence.length for each in batch.deciding]
    assert inputs.block_tables.shape == (len(pieces), max(-(-each.end // BLOCK_SIZE) for each in pieces))
    dtypes = (inputs.token_ids, inputs.positions, inputs.slot_mapping, inputs.logits_rows)
    assert all(tensor.dtype == torch.int64 for tensor in dtypes)
    assert all(t.dtype == torch.int32 for t in (inputs.cu_seqlens_q, inputs.kv_lens, inputs.block_tables))


@pytest.mark.parametrize("length", EDGES)
def test_decode_at_block_boundaries(length: int) -> None:
    allocator = BlockAllocator(50)
    pieces = [piece(allocator, length, output, length + output - 1, length + output) for output in (1, 2, 3)]
    assert_is_defined(build_batch(pieces, [], build_segments), pieces)


@pytest.mark.parametrize(("start", "end"), [(a, b) for a in (0, *EDGES) for b in EDGES if a < b])
def test_chunks_at_block_boundaries(start: int, end: int) -> None:
    allocator = BlockAllocator(50)
    pieces = [
        piece(allocator, 33, 0, start, end),
        piece(allocator, 17, 1, 17, 18),
        piece(allocator, 20, 13, start, end),  # recomputed behind a preemption: prompt and output in one chunk
        piece(allocator, end, 0, start, end),
    ]
    assert_is_defined(build_batch(pieces, [], build_segments), pieces)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 70), st.integers(0, 40), st.integers(0, 109), st.integers(1, 60)),
        min_size=1,
        max_size=9,
    )
)
def test_any_mix(rows: list[tuple[int, int, int, int]]) -> None:
    allocator = BlockAllocator(9 * 8)
    pieces = []
    for prompt, output, start, count in rows:
        start = min(start, prompt + output - 1)
        pieces.append(piece(allocator, prompt, output, start, min(start + count, prompt + output)))
    assert_is_defined(build_batch(pieces, [(1, 2)], build_segments), pieces)


@pytest.mark.parametrize("score_from", [0, 1, 15, 16, 17, 39, 40])
@pytest.mark.parametrize("cuts", [(40,), (16, 40), (15, 17, 40), (1, 39, 40)])
def test_scored_rows_predict_their_targets(score_from: int, cuts: tuple[int, ...]) -> None:
    allocator = BlockAllocator(20)
    one = piece(allocator, 40, 0, 0, 40, score_from=score_from)
    request, prompt = one.sequence.request, one.sequence.request.prompt
    seen: list[int] = []
    for start, end in itertools.pairwise((0, *cuts)):
        pieces = [piece(allocator, 3, 0, 0, 3), Piece(one.sequence, start, end)]
        batch = build_batch(pieces, [], build_segments)
        assert_is_defined(batch, pieces)
        for scored in batch.scored:
            rows = batch.inputs.logits_rows[scored.row : scored.row + len(scored.targets)]
            predicted_by = batch.inputs.positions[rows].tolist()
            assert [prompt[position + 1] for position in predicted_by] == scored.targets
            assert all(row >= 3 for row in rows.tolist())
            seen += scored.targets
            request.prompt_logprobs += [None] * len(scored.targets)  # type: ignore[list-item]
    assert seen == prompt[max(score_from, 1) :]


def test_runs_of_combos() -> None:
    allocator = BlockAllocator(20)
    a, b = ((3, 1.0),), ((3, 1.0), (5, -0.5))
    pieces = [
        piece(allocator, 5, 0, 0, 5),
        piece(allocator, 7, 0, 2, 5, combo=a),
        piece(allocator, 7, 1, 7, 8, combo=a),
        piece(allocator, 2, 0, 0, 2, combo=b),
    ]
    assert combo_runs(pieces) == ((5, ()), (4, a), (2, b))
    segments = build_batch(pieces, [], build_segments).inputs.segments
    assert segments is not None
    assert segments.starts.tolist() == [0, 5, 9, 11]
    assert segments.slots.tolist() == [[-1, -1], [3, -1], [3, 5]]
    assert build_batch(pieces[:1], [], build_segments).inputs.segments is None


@pytest.mark.parametrize(
    ("begins", "runs"),
    [
        (0, ((20, 1),)),
        (16, ((20, 1),)),
        (17, ((1, 0), (19, 1))),
        (32, ((16, 0), (4, 1))),
        (35, ((19, 0), (1, 1))),
        (36, ((20, 0),)),
        (39, ((20, 0),)),
    ],
)
def test_a_piece_is_cut_where_its_adapter_begins(begins: int, runs: tuple[tuple[int, int], ...]) -> None:
    one = piece(BlockAllocator(3), 40, 0, 16, 36, combo=((3, 1.0),), begins=begins)
    assert combo_runs([one]) == tuple((rows, ((3, 1.0),) if adapted else ()) for rows, adapted in runs)


PARTS = st.tuples(
    st.integers(0, 40), st.integers(1, 30), st.integers(0, 80), st.sampled_from([(), ((1, 1.0),), ((2, 0.5),)])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=8))
def test_each_row_uses_its_combo_from_its_begin_on(parts: list[tuple[int, int, int, Combo]]) -> None:
    allocator = BlockAllocator(8 * 5)
    pieces = [piece(allocator, 70, 0, start, start + n, combo=combo, begins=at) for start, n, at, combo in parts]
    expected = [
        combo if position >= at else () for start, n, at, combo in parts for position in range(start, start + n)
    ]
    runs = combo_runs(pieces)
    assert [combo for rows, combo in runs for _ in range(rows)] == expected
    assert all(rows > 0 for rows, _ in runs) and all(a[1] != b[1] for a, b in itertools.pairwise(runs))


def test_sixteen_rows_are_quick() -> None:
    """0.3 ms of processor time is the aim; the bound leaves room for a slow machine."""
    allocator = BlockAllocator(16 * 60)
    pieces = [piece(allocator, 800 + i, 1, 800 + i, 801 + i, combo=((i // 2, 1.0),)) for i in range(16)]
    segments = build_segments(combo_runs(pieces))
    times = []
    for _ in range(200):
        start = time.thread_time()
        build_batch(pieces, [], lambda runs: segments)
        times.append(time.thread_time() - start)
    assert np.median(times) < 1.5e-3
