"""Segments cover the batch row by row, whatever the runs."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.adapters.segments import Combo, build_segments

COMBOS = [(), ((0, 1.0),), ((1, -0.5),), ((1, 0.5), (0, 2.0)), ((0, 1.0), (1, 1.0), (2, 0.25))]


def rows_of(runs: list[tuple[int, Combo]]) -> list[Combo]:
    segments = build_segments(runs)
    starts = segments.starts.tolist()
    assert starts[0] == 0
    rows: list[Combo] = []
    for index, (start, end) in enumerate(pairwise(starts)):
        slots, weights = segments.slots[index].tolist(), segments.weights[index].tolist()
        used = [slot >= 0 for slot in slots]
        assert used == sorted(used, reverse=True), "used slots come first"
        assert all(weight == 0 for slot, weight in zip(slots, weights, strict=True) if slot < 0)
        rows += [tuple((s, w) for s, w in zip(slots, weights, strict=True) if s >= 0)] * (end - start)
    return rows


@given(st.lists(st.tuples(st.integers(0, 17), st.sampled_from(COMBOS)), max_size=12))
def test_every_row_has_its_combo(runs: list[tuple[int, Combo]]) -> None:
    assert rows_of(runs) == [combo for rows, combo in runs for _ in range(rows)]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(COMBOS)), max_size=12))
def test_neighbours_of_one_combo_are_one_segment(runs: list[tuple[int, Combo]]) -> None:
    segments = build_segments(runs)
    described = list(zip(segments.slots.tolist(), segments.weights.tolist(), strict=True))
    assert all(left != right for left, right in pairwise(described))
    assert bool((segments.starts.diff() > 0).all())


def test_shapes_and_types() -> None:
    segments = build_segments([(15, ()), (0, COMBOS[4]), (1, COMBOS[3]), (17, COMBOS[3]), (16, ())])
    assert segments.starts.tolist() == [0, 15, 33, 49]
    assert segments.slots.tolist() == [[-1, -1], [1, 0], [-1, -1]]
    assert segments.weights.tolist() == [[0, 0], [0.5, 2.0], [0, 0]]
    assert (segments.starts.dtype, segments.slots.dtype) == (torch.int32, torch.int32)
    assert segments.weights.dtype == torch.float32


def test_a_batch_of_the_base_alone_and_an_empty_one_have_no_slots() -> None:
    assert build_segments([(5, ())]).slots.shape == (1, 0)
    empty = build_segments([])
    assert empty.starts.tolist() == [0] and empty.slots.shape == (0, 0) and empty.weights.shape == (0, 0)
