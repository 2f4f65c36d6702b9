"""From a plan to the tensors of one step: all index arithmetic of the engine.

For piece s with tokens [start, end) of its sequence, and t running over the flat batch:

    cu_seqlens_q[s + 1] = cu_seqlens_q[s] + end - start
    positions[t]        = start + t - cu_seqlens_q[s]
    slot_mapping[t]     = block_table[s][positions[t] // 16] · 16 + positions[t] mod 16
    kv_lens[s]          = end
    sources[t]          = row of the step before whose token t is, where only the device knows it yet; else -1
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from lorry.kernels.lora import Segments
from lorry.server.cache.block_table import Copy
from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for
from lorry.server.engine.plan import Piece
from lorry.server.engine.sequence import Combo, Request, Sequence
from lorry.server.model.inputs import ModelInputs
from lorry.server.params import DoLa

Runs = tuple[tuple[int, Combo], ...]  # (rows, combo) of adjacent rows, over the flat batch


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompt tokens whose log-probabilities this step yields; `logits_rows[row : row + len(targets)]` are theirs."""

    request: Request
    row: int
    targets: list[int]


@dataclass(frozen=True, slots=True)
class Observed:
    """Prompt tokens whose hidden states the strategy wants; `hidden[row : row + count]` are theirs, in order."""

    sequence: Sequence
    row: int
    count: int


@dataclass(frozen=True, slots=True)
class Tapped:
    """A row of logits that DoLa contrasts with those of earlier layers.

    row: of logits; place: among the tapped rows; taps: the layers' indices in `ModelInputs.taps`
    """

    row: int
    place: int
    taps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    deciding: pieces that reach the end of their sequence; the first of `inputs.logits_rows` are theirs, in order, as
        many for each as are `decided`
    scored: the rows behind them
    observed: the rows behind those, of which only the hidden states are looked at
    tapped: rows of the deciding pieces whose earlier layers are wanted
    """

    inputs: ModelInputs
    copies: tuple[Copy, ...]
    pieces: tuple[Piece, ...]
    deciding: tuple[Piece, ...]
    scored: tuple[Scored, ...]
    observed: tuple[Observed, ...] = ()
    tapped: tuple[Tapped, ...] = ()

    @property
    def decided(self) -> int:
        """Rows of logits of all deciding pieces."""
        return sum(piece.decided for piece in self.deciding)


def build_batch(
    pieces: SequenceOf[Piece],
    copies: SequenceOf[Copy],
    build_segments: Callable[[Runs], Segments | None],
    build_end_segments: Callable[[Runs, Runs], Segments | None] = lambda runs, logits_runs: None,
) -> Batch:
    """Tensors for at least one piece, in a plan's order.

    The builders are called if any piece has an adapter. build_end_segments: of the runs over the batch and over the
    rows of logits makes the segments of the latter; None: no adapter changes the embedding or the head.
    """
    count = len(pieces)
    starts = np.fromiter((piece.start for piece in pieces), np.int64, count)
    ends = np.fromiter((piece.stop for piece in pieces), np.int64, count)
    lengths = ends - starts
    cu_seqlens = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    total = int(cu_seqlens[-1])

    block_tables = np.zeros((count, blocks_for(int(ends.max()))), np.int32)
    token_ids: list[int] = []
    unread: list[tuple[int, int]] = []
    for s, piece in enumerate(pieces):
        blocks = piece.sequence.table.row[: blocks_for(piece.stop)]
        block_tables[s, : len(blocks)] = blocks
        token_ids += piece.tokens()
        if piece.sequence.unread:  # always the last one
            token_ids.append(0)
            unread.append((int(cu_seqlens[s + 1]) - 1, piece.sequence.place))

    if total == count:
        owners, positions = np.arange(count), starts
    else:
        owners = np.repeat(np.arange(count), lengths)
        positions = np.arange(total) - (cu_seqlens[:-1] - starts)[owners]
    slots = block_tables[owners, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE

    lasts = cu_seqlens[1:].astype(np.int64) - 1
    deciding = [s for s, piece in enumerate(pieces) if piece.end == piece.sequence.length]
    rows = [lasts if len(deciding) == count else lasts[deciding]]
    if any(piece.draft for piece in pieces):
        rows = [np.arange(lasts[s] + 1 - pieces[s].decided, lasts[s] + 1) for s in deciding]
    scored, next_row = [], sum(map(len, rows))
    for s, piece in enumerate(pieces):
        if piece.sequence.request.message.prompt_logprobs_from is None:
            continue
        targets = scored_targets(piece)
        if len(targets) > 0:
            prompt = piece.sequence.request.prompt
            scored.append(Scored(piece.sequence.request, next_row, prompt[targets.start : targets.stop]))
            rows.append(int(cu_seqlens[s]) + np.arange(targets.start, targets.stop) - 1 - piece.start)
            next_row += len(targets)
    observed = []
    for s, piece in enumerate(pieces):
        if piece.sequence.request.observed is not None and len(found := observed_tokens(piece)) > 0:
            observed.append(Observed(piece.sequence, next_row, len(found)))
            rows.append(int(cu_seqlens[s]) + np.arange(found.start, found.stop) - piece.start)
            next_row += len(found)

    taps, tapped = tapped_rows([pieces[s] for s in deciding])

    logits_rows = np.concatenate(rows) if len(rows) > 1 else rows[0]
    tap_rows = logits_rows[[each.row for each in tapped]] if tapped else None
    runs = combo_runs(pieces)
    adapted = any(combo for _, combo in runs)
    inputs = ModelInputs(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        cu_seqlens_q=torch.from_numpy(cu_seqlens),
        kv_lens=torch.from_numpy(ends.astype(np.int32)),
        block_tables=torch.from_numpy(block_tables),
        segments=build_segments(runs) if adapted else None,
        logits_rows=torch.from_numpy(logits_rows),
        max_query_len=int(lengths.max()),
        logits_segments=build_end_segments(runs, runs_of_rows(runs, logits_rows)) if adapted else None,
        sources=_sources(unread, total) if unread else None,
        taps=taps,
        tap_rows=None if tap_rows is None else torch.from_numpy(tap_rows),
        tap_segments=None
        if tap_rows is None or not adapted
        else build_end_segments(runs, runs_of_rows(runs, tap_rows)),
    )
    deciding_pieces = tuple(pieces[s] for s in deciding)
    return Batch(inputs, tuple(copies), tuple(pieces), deciding_pieces, tuple(scored), tuple(observed), tapped)


def tapped_rows(deciding: SequenceOf[Piece]) -> tuple[tuple[int, ...], tuple[Tapped, ...]]:
    """The layers that the deciding pieces of a step want together, rising, and which row wants which."""
    wanted: list[tuple[int, DoLa]] = []
    row = 0
    for piece in deciding:
        if (dola := piece.sequence.request.dola) is not None:
            wanted.append((row, dola))
        row += piece.decided
    if not wanted:
        return (), ()
    layers = sorted({layer for _, dola in wanted for layer in dola.layers})
    return tuple(layers), tuple(
        Tapped(row, place, tuple(map(layers.index, dola.layers))) for place, (row, dola) in enumerate(wanted)
    )


def _sources(unread: list[tuple[int, int]], total: int) -> torch.Tensor:
    sources = torch.full((total,), -1, dtype=torch.int64)
    where, rows = torch.tensor(unread, dtype=torch.int64).T
    sources[where] = rows
    return sources


def combo_runs(pieces: SequenceOf[Piece]) -> Runs:
    """Lengths of the runs of rows that share a combo, over the flat batch; tokens before a combo's start have none."""
    runs: list[tuple[int, Combo]] = []
    for piece in pieces:
        sequence = piece.sequence
        split = min(max(sequence.namespace.start, piece.start), piece.stop)
        for rows, combo in ((split - piece.start, ()), (piece.stop - split, sequence.combo)):
            if rows == 0:
                continue
            if runs and runs[-1][1] == combo:
                rows += runs.pop()[0]
            runs.append((rows, combo))
    return tuple(runs)


def runs_of_rows(runs: Runs, rows: NDArray[np.int64]) -> Runs:
    """The runs of the batch's rows `rows`, taken in their order."""
    owners = np.searchsorted(np.cumsum([count for count, _ in runs]), rows, side="right")
    return tuple((len(list(group)), runs[owner][1]) for owner, group in groupby(owners.tolist()))


def scored_targets(piece: Piece) -> range:
    """Prompt positions whose log-probability this piece yields: those after each of its tokens, where wanted."""
    request = piece.sequence.request
    score_from = request.score_from
    if score_from is None or piece.sequence.shadowy:
        return range(0)
    return range(max(piece.start + 1, score_from), min(piece.end + 1, len(request.prompt)))


def observed_tokens(piece: Piece) -> range:
    """Prompt positions of this piece whose hidden states are wanted and have not been seen yet."""
    request = piece.sequence.request
    if request.observed is None:
        return range(0)
    return range(max(piece.start, request.observed), min(piece.end, len(request.prompt)))
