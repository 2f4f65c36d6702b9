"""The next token of each row on the device of its logits, enqueued and not waited for.

In a step: one copy of the rows' parameters to the device; where rows ask for it, one launch that changes their logits
(`penalize`), and -inf for all but their allowed tokens and for what the cuts of `truncation.py` drop that `sample` does
not know; the launches of `sample`; where rows ask for it, their log-probabilities; copies back and an event.
Nothing is kept on the device from step to step. What a row's processors need of its text goes along each time, as lists
of distinct tokens from the host's tables: 8 bytes a token. The one token that the host may not know yet is read from
the device, where `penalize` counts it in.

Memory on the device: the parameters, `sample`'s statistics (about a thirtieth of the logits), and, where only some rows
ask for log-probabilities or processors change logits, those rows' logits once more. Rows with cuts that `sample` does
not know have their vocabulary sorted by torch, with about a hundred bytes for each of their logits: a first form, right
rather than fast, which only such rows pay for. All of it lasts for the step.

What Triton compiles for does not depend on the rows: `sample` is two kernels, `penalize` one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.kernels.sampling import TINY, Draws, SamplingRows, TokenValues, penalize, sample
from lorry.kernels.transfer import Readback, to_device
from lorry.server.decoding.allowed_tokens import restrict_at
from lorry.server.decoding.cuts.left import Left
from lorry.server.decoding.cuts.top_n_sigma import deviation
from lorry.server.decoding.interface import Continuation, Row
from lorry.server.decoding.lists import TokenLists
from lorry.server.decoding.logprobs import figures, reports
from lorry.server.decoding.truncation import Stage, Truncation, extended, narrow

WHOLE = 2**31 - 1  # no top-k passes it
LEAST = 1e-300  # as min-p: keeps all that is not -inf, and has `sample` draw in the order of falling z


class Chosen:
    """A `Pending`: one token for each row, and the log-probabilities of the rows that ask for them."""

    def __init__(self, rows: Sequence[Row], tokens: Tensor, asking: Sequence[int], table: Tensor | None) -> None:
        """tokens: int64 [R]; asking: the rows of `table`, which is as `figures` makes it."""
        self.tokens = tokens
        self._asking = asking
        self._top = [rows[place].logprobs or 0 for place in asking]
        self._entropies = [rows[place].entropy for place in asking]
        self._readback = Readback(tokens) if table is None else Readback(tokens, table)

    def continuations(self) -> list[Continuation]:
        tokens, *tables = self._readback.wait()
        found = {}
        if tables:
            found = dict(zip(self._asking, reports(tables[0], self._top, self._entropies), strict=True))
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
    epsilons: Mapping[int, float] | None = None,
) -> Chosen:
    """Choose the next token of each row.

    logits: float32 [R, V]; those that lists name are overwritten
    lists: what processors change; None: nothing
    unread, last: as in `Strategy.begin`
    raw: float32 [R, V], what log-probabilities are of; None: logits, as they come in
    epsilons: mirostat's, by place
    """
    assert last is not None or not any(unread)
    asking = [place for place, row in enumerate(rows) if row.logprobs is not None]
    cutting = [place for place, row in enumerate(rows) if row.sampling.temperature > 0 and extended(row)]
    known = [] if lists is None else lists.arrays()
    columns = to_device([*_parameters(rows, unread, cutting), np.array(asking, np.int64), *known], logits.device)
    seeds, indices, positions, temperature, top_k, top_p, min_p, places, *told = columns
    raw = logits if raw is None else raw
    if asking and (lists is not None or cutting or len(asking) < len(rows)):
        raw = raw.index_select(0, places)
    if lists is not None:
        starts, ids, values, count_starts, count_ids, counts, repetition, presence, frequency, counting, *limits = told
        if len(limits[0]):
            restrict_at(logits, *limits)
        news = torch.full_like(seeds, -1) if last is None else torch.where(counting, last, -1)
        bias = TokenValues(starts, ids, values)
        penalize(logits, bias, TokenValues(count_starts, count_ids, counts), repetition, presence, frequency, news)
    if cutting:
        _cut(rows, cutting, epsilons or {}, logits)
    tokens, _ = sample(logits, SamplingRows(temperature, top_k, top_p, min_p), Draws(seeds, indices, positions))
    table = None
    if asking:
        wanted = tokens if len(asking) == len(rows) else tokens.index_select(0, places)
        entropies = any(rows[place].entropy for place in asking)
        table = figures(raw, wanted, max(rows[place].logprobs or 0 for place in asking), entropies)
    return Chosen(rows, tokens, asking, table)


def _cut(rows: Sequence[Row], places: Sequence[int], epsilons: Mapping[int, float], logits: Tensor) -> None:
    """Write -inf over what all cuts of the rows at `places` drop."""
    cuts = Truncation.of([rows[place] for place in places])
    steered = [at for at, place in enumerate(places) if place in epsilons]
    if steered:
        cuts = cuts.with_epsilon(steered, np.array([epsilons[places[at]] for at in steered]))
    arrays = cuts.arrays()
    indices = [np.empty(0, np.int64) if rows is None else rows for _, rows, _ in arrays]
    sent = [np.array(places, np.int64), cuts.column("temperature"), *indices, *(values for _, _, values in arrays)]
    at, temperature, *parts = to_device(sent, logits.device)
    stages = [
        Stage(cut, None if rows is None else of, values)
        for (cut, rows, _), of, values in zip(arrays, parts, parts[len(arrays) :], strict=False)
    ]
    z = logits.index_select(0, at)
    sigma = deviation(z) if cuts.column("top_n_sigma").any() else None
    left = Left.of(z.sort(dim=1, descending=True).values, temperature, sigma)
    narrow(left, stages)
    low, high = left.bounds()
    logits.index_copy_(0, at, z.masked_fill((z < low[:, None]) | (z > high[:, None]), -torch.inf))


def _parameters(rows: Sequence[Row], unread: Sequence[int], cutting: Sequence[int]) -> list[np.ndarray]:
    """Seeds, indices, positions, temperatures, top-k, top-p, min-p, each [R], in the types of `kernels.sampling`.

    cutting: rows whose cuts are made before
    """
    sampling = [row.sampling for row in rows]
    temperature = np.array([each.temperature for each in sampling], np.float64)
    top_k = np.array([min(each.top_k, WHOLE) for each in sampling], np.int32)
    top_p = np.array([each.top_p for each in sampling], np.float64)
    min_p = np.array([each.min_p for each in sampling], np.float64)
    top_k[cutting], top_p[cutting], min_p[cutting] = 0, 1.0, LEAST
    return [
        np.array([each.seed for each in sampling], np.uint64).view(np.int64),
        np.array([row.index for row in rows], np.int64),
        np.array([len(row.output_token_ids) + more for row, more in zip(rows, unread, strict=True)], np.int64),
        np.where(temperature == 0.0, 0.0, np.maximum(temperature, TINY)).astype(np.float32),
        top_k,
        top_p,
        min_p,
    ]
