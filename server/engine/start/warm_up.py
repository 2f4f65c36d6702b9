"""Steps that together launch every kernel in every way that serving can, so that no request pays for a compilation.

What a kernel is compiled for depends on a step in four ways only:

    rows                 the products' plans and tiles, those of silu_mul, the tiles of LoRA routes
    rows of a sequence   attention's plans and the queries of its decode plan
    sequences            the groups of LoRA routes, twice as many where each sequence's adapter begins to act within its
                         rows; the rows of logits, where the head is a product like the others
    adapters or none     with adapters, those of the embedding and the head as well

each by powers of two. The rest (lengths of texts, widths of block tables, adapters, pages) are numbers at run time. So
there is a step for each power of two of rows, as few sequences and as many, with adapters and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from lorry.kernels.lora import Segments
from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for
from lorry.server.engine.scheduler import Limits
from lorry.server.model.inputs import ModelInputs


@dataclass(frozen=True, slots=True)
class Shape:
    """lengths: rows of each sequence; adapters: most of a combo, 0: a step without; pages: `Segments.page_bound`;
    cut: the adapters of sequences of several rows act on the last of these only."""

    lengths: tuple[int, ...]
    adapters: int = 0
    pages: int = 0
    cut: bool = False

    @property
    def rows(self) -> int:
        return sum(self.lengths)


def most_rows(limits: Limits) -> int:
    """Of a step: the budget, but at least a decoded token of each other sequence and a block of a prompt."""
    sequences = limits.max_running * limits.context_length
    return min(max(limits.token_budget, limits.max_running - 1 + BLOCK_SIZE), sequences)


def warm_up_shapes(limits: Limits) -> list[Shape]:
    """The steps, those of few rows first."""
    most = most_rows(limits)
    found = dict[Shape, None]()
    for rows in (*_powers(most), min(most, limits.context_length), most):
        few, many = -(-rows // limits.context_length), min(rows, limits.max_running)
        for sequences in (few, many):
            for adapters in (0, 1):
                found[Shape(_shared(rows, sequences), adapters, adapters)] = None
        if rows > many:
            found[Shape(_shared(rows, many), 1, 1, cut=True)] = None
    return list(found)


def largest_step(limits: Limits, adapters: int, pages: int) -> Shape:
    """As many rows, sequences, adapters and pages as a step can have, prompts and decoding mixed."""
    lengths, left = list[int](), most_rows(limits)
    for others in reversed(range(limits.max_running)):
        lengths.append(min(limits.context_length, left - others))
        left -= lengths[-1]
    return Shape(tuple(lengths), adapters, pages, cut=adapters > 0)


def decode_step(rows: int, adapters: int, pages: int) -> Shape:
    """One token for each of `rows` sequences."""
    return Shape((1,) * rows, adapters, pages)


def inputs_of(shape: Shape, table_blocks: int, device: torch.device) -> ModelInputs:
    """A step that stores nothing, and reads no block but number 0; each sequence has begun with it.

    table_blocks: width of the block tables, which attention's workspace follows from. No adapter is named.
    """
    count = len(shape.lengths)
    lengths = torch.tensor(shape.lengths, device=device)
    starts = torch.zeros(count + 1, dtype=torch.int32, device=device)
    starts[1:] = lengths.cumsum(0)
    assert max(shape.lengths) <= table_blocks * BLOCK_SIZE
    segments = None
    if shape.adapters:
        parts = _halves(shape.lengths) if shape.cut else shape.lengths
        bounds = torch.tensor([0, *accumulate(parts)], dtype=torch.int32, device=device)
        combos = (len(parts), shape.adapters)
        slots = torch.full(combos, -1, dtype=torch.int32, device=device)
        segments = Segments(bounds, slots, torch.zeros(combos, device=device), shape.pages)
    return ModelInputs(
        token_ids=torch.zeros(shape.rows, dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(length, device=device) for length in shape.lengths]),
        slot_mapping=torch.full((shape.rows,), -1, device=device),
        cu_seqlens_q=starts,
        kv_lens=lengths.int(),
        block_tables=torch.zeros(count, table_blocks, dtype=torch.int32, device=device),
        segments=segments,
        logits_rows=torch.arange(shape.rows, device=device),
        max_query_len=max(shape.lengths),
        logits_segments=segments,
    )


def table_width(limits: Limits) -> int:
    """Blocks of a sequence of full context."""
    return blocks_for(limits.context_length)


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def _shared(rows: int, sequences: int) -> tuple[int, ...]:
    """`rows` over so many sequences, as even as can be."""
    each, more = divmod(rows, sequences)
    return (each + 1,) * more + (each,) * (sequences - more)


def _halves(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Each length in two, as far as can be."""
    return tuple(part for length in lengths for part in (length // 2, length - length // 2) if part)
