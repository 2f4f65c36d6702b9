"""Decode steps as CUDA graphs: the launches of a step are recorded once per bucket and replayed with other inputs.

    bucket = (rows, blocks of a block table, pages of a combo); a step is padded to the least one that holds it

A graph reads static tensors only: the inputs' one buffer, the KV cache, the adapters' tables. So a new adapter, or one
that moved, records nothing again. Buckets of no pages are the steps without adapters. Padding rows hold no token: no
key is stored (slot -1), none is read (kv_len 0), they belong to no segment, and nobody looks at their logits.

All graphs share one memory pool, since one runs at a time and what it yields is copied out at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from lorry.kernels.lora import Segments
from lorry.server.engine.output import Output
from lorry.server.engine.staging import packed_bytes, upload
from lorry.server.model.inputs import ModelInputs

MOST_ADAPTERS = 8  # of a combo in a graph
PAGE_BUCKETS = (1, 4, 16, 64, 128)  # that a step makes room for; the last: 8 adapters of rank 256 without vectors
GRAPH_PAGES = (0, 1, 4, 16)  # the largest: one adapter of rank 256 without vectors
FIRST_BLOCKS = 64  # of the least bucket, 1024 tokens; attention's grid grows with the width of the table

Compute = Callable[[ModelInputs, Output], object]
"""Launches a step, all rows of which decide, and writes its output."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """rows: sequences of one token each; blocks: width of their block tables; pages: `Segments.page_bound`, 0: none."""

    rows: int
    blocks: int
    pages: int


def row_buckets(most: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8 to 64, of 16 to 128, of 32 beyond; `most` is the last."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most, 32)]
    return [rows for rows in steps if rows < most] + [most]


def block_buckets(most: int) -> list[int]:
    """FIRST_BLOCKS, four times that, and so on; `most` is the last."""
    found, blocks = [], FIRST_BLOCKS
    while blocks < most:
        found.append(blocks)
        blocks *= 4
    return [*found, most]


def page_bucket(pages: int) -> int:
    """The least of PAGE_BUCKETS that holds `pages`; beyond them `pages` itself."""
    return max(pages, _least(PAGE_BUCKETS, pages))


def all_buckets(max_rows: int, max_blocks: int) -> list[Bucket]:
    """Largest first, so that the others find room in the memory that it took."""
    sizes = product(row_buckets(max_rows), block_buckets(max_blocks), GRAPH_PAGES)
    return sorted((Bucket(*size) for size in sizes), reverse=True)


def needed_bucket(inputs: ModelInputs) -> Bucket | None:
    """What a step needs at least; None for one that no graph can be: each sequence must have one token, and decide, no
    layer may be tapped, and no adapter change the embedding or the head."""
    rows, segments = inputs.kv_lens.shape[0], inputs.segments
    if inputs.max_query_len != 1 or inputs.logits_rows.shape[0] != rows or inputs.logits_segments is not None:
        return None
    if inputs.taps:
        return None
    if segments is None:
        return Bucket(rows, inputs.block_tables.shape[1], 0)
    if segments.page_bound == 0 or segments.slots.shape[1] > MOST_ADAPTERS:
        return None
    return Bucket(rows, inputs.block_tables.shape[1], segments.page_bound)


def padded(inputs: ModelInputs, bucket: Bucket) -> ModelInputs:
    """The step in the shapes of its bucket."""
    rows = inputs.kv_lens.shape[0]
    segments = inputs.segments
    if bucket.pages and segments is None:
        none = torch.zeros(0, 0)
        segments = Segments(torch.zeros(1, dtype=torch.int32), none.int(), none)
    sources = inputs.sources if inputs.sources is not None else torch.full((rows,), -1)
    return ModelInputs(
        token_ids=_grown(inputs.token_ids, 0, bucket.rows),
        positions=_grown(inputs.positions, 0, bucket.rows),
        slot_mapping=_grown(inputs.slot_mapping, -1, bucket.rows),
        cu_seqlens_q=torch.arange(bucket.rows + 1, dtype=torch.int32),
        kv_lens=_grown(inputs.kv_lens, 0, bucket.rows),
        block_tables=_grown(inputs.block_tables, 0, bucket.rows, bucket.blocks),
        segments=None
        if segments is None
        else Segments(
            _grown(segments.starts, rows, bucket.rows + 1),
            _grown(segments.slots, -1, bucket.rows, MOST_ADAPTERS),
            _grown(segments.weights, 0, bucket.rows, MOST_ADAPTERS),
            bucket.pages,
        ),
        logits_rows=torch.arange(bucket.rows),
        max_query_len=1,
        sources=_grown(sources, -1, bucket.rows),
    )


def _grown(x: Tensor, padding: int, *shape: int) -> Tensor:
    """x in the corner of a tensor of `shape`, padding elsewhere."""
    grown = torch.full(shape, padding, dtype=x.dtype)
    grown[tuple(slice(size) for size in x.shape)] = x
    return grown


def idle_step() -> ModelInputs:
    """A step of no sequences, to be padded."""
    longs, ints = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    return ModelInputs(longs, longs, longs, torch.zeros(1, dtype=torch.int32), ints, ints.view(0, 0), None, longs, 1)


def _least(sizes: Sequence[int], needed: int) -> int:
    """The first of rising `sizes` that is at least `needed`; -1: none is."""
    return next((size for size in sizes if size >= needed), -1)


class Recorder:
    """Turns a function that only launches into one that launches the same again. On a CPU it is called again."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if self._stream is not None else None

    def record(self, launch: Callable[[], object]) -> Callable[[], object]:
        """Launches once, which compiles what has to be, then records."""
        if self._stream is None:
            return launch
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay


class DecodeGraphs:
    """The recorded steps of all `buckets`. The tensors of an Output are those of the next one too."""

    def __init__(self, compute: Compute, buckets: Iterable[Bucket], output: Output) -> None:
        """output: of the largest batch; graphs write there."""
        self._compute = compute
        self._device = output.logits.device
        self._output = output
        self.buckets = sorted(buckets)
        self._rows = sorted({bucket.rows for bucket in self.buckets})
        self._blocks = sorted({bucket.blocks for bucket in self.buckets})
        size = max(packed_bytes(padded(idle_step(), bucket)) for bucket in self.buckets)
        self._inputs = torch.zeros(size, dtype=torch.uint8, device=self._device)
        self._replays: dict[Bucket, Callable[[], object]] = {}

    def record(self, recorder: Recorder) -> Iterator[Bucket]:
        """Record bucket by bucket, the largest first; yields each when it is done."""
        for bucket in reversed(self.buckets):
            inputs = upload(padded(idle_step(), bucket), self._device, self._inputs)

            output = self._output.first(bucket.rows)
            self._replays[bucket] = recorder.record(partial(self._compute, inputs, output))
            yield bucket

    def find(self, inputs: ModelInputs) -> Bucket | None:
        """The least recorded bucket that holds the step; None: launch it kernel by kernel."""
        needed = needed_bucket(inputs)
        if needed is None:
            return None
        rows, blocks = _least(self._rows, needed.rows), _least(self._blocks, needed.blocks)
        bucket = Bucket(rows, blocks, _least(GRAPH_PAGES, needed.pages))
        return bucket if bucket in self._replays else None

    def replay(self, inputs: ModelInputs, bucket: Bucket) -> Output:
        """Run a step, on the CPU so far, as `bucket`."""
        upload(padded(inputs, bucket), self._device, self._inputs)
        self._replays[bucket]()
        return self._output.first(inputs.kv_lens.shape[0])
