"""Buckets, padding and replay of recorded decode steps, on a CPU: what is recorded there is called again."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorry.adapters.segments import build_segments
from lorry.kernels.lora import Segments
from lorry.server.engine.graphs import (
    GRAPH_PAGES,
    MOST_ADAPTERS,
    PAGE_BUCKETS,
    Bucket,
    all_buckets,
    block_buckets,
    idle_step,
    needed_bucket,
    padded,
    page_bucket,
    row_buckets,
)
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.staging import packed_bytes, tensors_of, upload
from lorry.server.model.inputs import ModelInputs


def step(rows: int, blocks: int, combos: list[tuple[tuple[int, float], ...]] | None = None) -> ModelInputs:
    """One token for each of `rows` sequences, every number another."""
    numbers = torch.arange(1, rows + 1)
    segments = None
    if combos is not None:
        runs = [(1, combos[row % len(combos)]) for row in range(rows)]
        segments = replace(build_segments(runs), page_bound=3)
    return ModelInputs(
        token_ids=10 + numbers,
        positions=20 + numbers,
        slot_mapping=30 + numbers,
        cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32),
        kv_lens=(21 + numbers).int(),
        block_tables=torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks),
        segments=segments,
        logits_rows=torch.arange(rows),
        max_query_len=1,
        sources=None,
    )


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 64, 65, 200, 256])
def test_every_number_of_rows_has_a_bucket_that_wastes_less_than_half(most: int) -> None:
    buckets = row_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[-1] == most
    for rows in range(1, most + 1):
        bucket = next(bucket for bucket in buckets if bucket >= rows)
        assert bucket < 2 * rows and bucket - rows < 32


@pytest.mark.parametrize("most", [1, 63, 64, 65, 256, 512, 8192])
def test_every_context_has_a_bucket(most: int) -> None:
    buckets = block_buckets(most)
    assert buckets == sorted(set(buckets)) and buckets[-1] == most
    assert all(larger <= 4 * smaller for smaller, larger in itertools.pairwise(buckets))


def test_pages_are_rounded_up() -> None:
    assert [page_bucket(pages) for pages in (1, 2, 4, 5, 16, 17, 128, 129)] == [1, 4, 4, 16, 16, 64, 128, 129]
    assert set(GRAPH_PAGES) - {0} <= set(PAGE_BUCKETS)


def test_what_no_graph_can_be() -> None:
    whole = step(5, 3, [((0, 1.0),)])
    assert needed_bucket(whole) == Bucket(5, 3, 3)
    assert needed_bucket(step(5, 3)) == Bucket(5, 3, 0)
    assert needed_bucket(replace(whole, max_query_len=2)) is None
    assert needed_bucket(replace(whole, logits_rows=torch.arange(4))) is None  # a prompt's chunk of one token
    assert needed_bucket(replace(whole, logits_rows=torch.arange(6))) is None  # a scored row
    many = build_segments([(5, tuple((slot, 1.0) for slot in range(MOST_ADAPTERS + 1)))])
    assert needed_bucket(replace(whole, segments=replace(many, page_bound=3))) is None


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("combos", [None, [(), ((4, 0.5), (2, -1.0)), ((4, 0.5), (2, -1.0)), ((7, 1.0),)]])
def test_padding_touches_nothing(rows: int, combos: Any) -> None:
    given = step(rows, 3, combos)
    bucket = Bucket(8, 4, 0 if combos is None else 4)
    grown = padded(given, bucket)
    for name, tensor in tensors_of(given).items():
        if name not in ("cu_seqlens_q", "segments.starts"):
            corner = tensors_of(grown)[name][tuple(map(slice, tensor.shape))]
            assert torch.equal(corner, tensor) and corner.dtype is tensor.dtype, name
    assert grown.cu_seqlens_q.tolist() == list(range(9)) and grown.logits_rows.tolist() == list(range(8))
    assert grown.slot_mapping[rows:].eq(-1).all() and grown.kv_lens[rows:].eq(0).all()
    assert grown.sources is not None and grown.sources.eq(-1).all()
    assert grown.block_tables.shape == (8, 4)
    if combos is None:
        assert grown.segments is None
        return
    assert grown.segments is not None and given.segments is not None
    assert grown.segments.page_bound == 4 and grown.segments.slots.shape == (8, MOST_ADAPTERS)
    assert combos_of(grown.segments, 8) == [*combos_of(given.segments, rows), *[()] * (8 - rows)]


def combos_of(segments: Segments, rows: int) -> list[tuple[tuple[int, float], ...]]:
    """Of each row, as the kernels read them."""
    found: list[tuple[tuple[int, float], ...]] = [()] * rows
    starts = segments.starts.tolist()
    for number, (slots, weights) in enumerate(zip(segments.slots.tolist(), segments.weights.tolist(), strict=True)):
        combo = tuple((slot, weight) for slot, weight in zip(slots, weights, strict=True) if slot >= 0)
        found[starts[number] : starts[number + 1]] = [combo] * (starts[number + 1] - starts[number])
    return found


def test_a_step_without_sequences_fits_every_bucket() -> None:
    for bucket in all_buckets(9, 70):
        grown = padded(idle_step(), bucket)
        assert grown.slot_mapping.eq(-1).all() and grown.kv_lens.eq(0).all()
        assert (grown.segments is not None) == (bucket.pages > 0)
        if grown.segments is not None:
            assert combos_of(grown.segments, bucket.rows) == [()] * bucket.rows


@pytest.mark.parametrize("combos", [None, [((3, 0.25),), ()]])
def test_a_step_arrives_as_it_was_in_memory_of_its_own_or_given(combos: Any) -> None:
    memory = torch.empty(200_000, dtype=torch.uint8)
    for rows in (3, 9, 1, 500, 4):
        given = step(rows, 40, combos)
        memory.fill_(255)
        for into in (None, memory):
            arrived = upload(given, torch.device("cpu"), into)
            assert arrived.max_query_len == 1
            assert (arrived.segments is None) == (given.segments is None)
            for name, tensor in tensors_of(given).items():
                moved = tensors_of(arrived)[name]
                assert torch.equal(moved, tensor) and moved.dtype is tensor.dtype
                assert moved.data_ptr() % 16 == 0
        assert memory[packed_bytes(given) :].eq(255).all()


@pytest.mark.parametrize("adapters", [None, {"b": 1.0}, {"c": 0.5, "e": -0.25}])
def test_a_replayed_step_gives_the_tokens_of_one_that_is_launched(build: Any, generate: Any, adapters: Any) -> None:
    requests = [
        generate(str(number), [2 + number, *range(5, 5 + 7 * number)], 9, adapters=adapters if number % 2 else None)
        for number in range(5)
    ]
    plain = [answer.tokens() for answer in build().generate(*requests)]
    engine: LocalEngine = build(ahead=True, max_running=6)
    runner = engine.engine.runner
    recorded = list(runner.record(all_buckets(6, 19)))
    assert recorded == sorted(recorded, reverse=True)
    used: list[Bucket] = []
    assert runner.graphs is not None
    replay = runner.graphs.replay

    def counted(inputs: ModelInputs, bucket: Bucket) -> Any:
        used.append(bucket)
        return replay(inputs, bucket)

    runner.graphs.replay = counted  # type: ignore[method-assign]
    assert [answer.tokens() for answer in engine.generate(*requests)] == plain
    assert len(used) >= 8 and any(bucket.pages for bucket in used) == (adapters is not None)
