"""The next token of each row on the device of its logits, enqueued and not waited for.

In a step: one copy of the rows' parameters to the device; where rows ask for it, one launch that changes their logits
(`penalize`); the launches of `sample`; where rows ask for it, their log-probabilities; copies back and an event.
Nothing is kept on the device from step to step. What a row's processors need of its text goes along each time, as lists
of distinct tokens from the host's tables: 8 bytes a token. The one token that the host may not know yet is read from
the device, where `penalize` counts it in.

Memory on the device: the parameters, `sample`'s statistics (about a thirtieth of the logits), and, where only some rows
ask for log-probabilities or processors change logits, those rows' logits once more. All of it lasts for the step.

What Triton compiles for does not depend on the rows: `sample` is two kernels, `penalize` one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.kernels.sampling import TINY, Draws, SamplingRows, TokenValues, penalize, sample
from lorry.kernels.transfer import Readback, to_device
from lorry.server.decoding.interface import Continuation, Row
from lorry.server.decoding.lists import TokenLists
from lorry.server.decoding.logprobs import figures, reports

WHOLE = 2**31 - 1  # no top-k passes it


class Chosen:
    """A `Pending`: one token for each row, and the log-probabilities of the rows that ask for them."""

    def __init__(self, rows: Sequence[Row], tokens: Tensor, asking: Sequence[int], table: Tensor | None) -> None:
        """tokens: int64 [R]; asking: the rows of `table`, which is as `figures` makes it."""
        self.tokens = tokens
        self._asking = asking
        self._top = [rows[place].logprobs or 0 for place in asking]
        self._readback = Readback(tokens) if table is None else Readback(tokens, table)

    def continuations(self) -> list[Continuation]:
        tokens, *tables = self._readback.wait()
        found = {}
        if tables:
            found = dict(zip(self._asking, reports(tables[0], self._top), strict=True))
        return [
            Continuation(place, (token,), (found[place],) if place in found else None)
            for place, token in enumerate(tokens.tolist())
        ]


def begin(
    rows: Sequence[Row],
    logits: Tensor,
    lists: TokenLists | None,
    unread: Sequence[int],
    last: Tensor | None,
    raw: Tensor | None = None,
) -> Chosen:
    """Choose the next token of each row.

    logits: float32 [R, V]; those that lists name are overwritten
    lists: what processors change; None: nothing
    unread, last: as in `Strategy.begin`
    raw: float32 [R, V], what log-probabilities are of; None: logits, as they come in
    """
    assert last is not None or not any(unread)
    asking = [place for place, row in enumerate(rows) if row.logprobs is not None]
    known = [] if lists is None else lists.arrays()
    columns = to_device([*_parameters(rows, unread), np.array(asking, np.int64), *known], logits.device)
    seeds, indices, positions, temperature, top_k, top_p, min_p, places, *told = columns
    raw = logits if raw is None else raw
    if asking and (lists is not None or len(asking) < len(rows)):
        raw = raw.index_select(0, places)
    if lists is not None:
        starts, ids, values, count_starts, count_ids, counts, repetition, presence, frequency, counting = told
        news = torch.full_like(seeds, -1) if last is None else torch.where(counting, last, -1)
        bias = TokenValues(starts, ids, values)
        penalize(logits, bias, TokenValues(count_starts, count_ids, counts), repetition, presence, frequency, news)
    tokens, _ = sample(logits, SamplingRows(temperature, top_k, top_p, min_p), Draws(seeds, indices, positions))
    table = None
    if asking:
        wanted = tokens if len(asking) == len(rows) else tokens.index_select(0, places)
        table = figures(raw, wanted, max(rows[place].logprobs or 0 for place in asking))
    return Chosen(rows, tokens, asking, table)


def _parameters(rows: Sequence[Row], unread: Sequence[int]) -> list[np.ndarray]:
    """Seeds, indices, positions, temperatures, top-k, top-p, min-p, each [R], in the types of `kernels.sampling`."""
    sampling = [row.sampling for row in rows]
    temperature = np.array([each.temperature for each in sampling], np.float64)
    return [
        np.array([each.seed for each in sampling], np.uint64).view(np.int64),
        np.array([row.index for row in rows], np.int64),
        np.array([len(row.output_token_ids) + more for row, more in zip(rows, unread, strict=True)], np.int64),
        np.where(temperature == 0.0, 0.0, np.maximum(temperature, TINY)).astype(np.float32),
        np.array([min(each.top_k, WHOLE) for each in sampling], np.int32),
        np.array([each.top_p for each in sampling], np.float64),
        np.array([each.min_p for each in sampling], np.float64),
    ]
