"""Greedy decoding and sampling: one token per row.

    p[t] ∝ exp(z[t] / T) on the tokens that are left after  temperature → top-k → top-p → min-p
    top-k: z[t] >= the k-th largest z
    top-p: Σ p over tokens with larger z < top_p, of what top-k left
    min-p: p[t] >= min_p · max p

The order and the conditions are those of transformers' warpers. The three keep a token whenever they keep a
less likely one, so what is left is "all tokens with z at least a threshold": tokens of equal z are kept or
dropped together (transformers does so for top-k and min-p; in its top-p the order of equal tokens is
accidental).

A row's draw depends on its logits and (seed, index, number of tokens it has put out), see `lorry.kernels.philox`: one
uniform number u per token, inverted through the cumulative distribution, in the order of falling z (truncated
rows) or of token ids (plain rows). T = 0 is argmax: the smallest id among equals.

Truncated rows do not sort the vocabulary. The largest 128 values come from block maxima; if the threshold lies
below them, the largest 2048 from a partition; a row that keeps more than that gets its threshold from its sorted
probabilities and is drawn from like a plain row. Sums run in float64 from the largest down, and how a row is done
depends on that row only, so that its draw has the same bits in any batch.

That is the CPU's way, in this file and in `rowwise.py`. On a GPU `lorry.kernels.sampling` draws the same tokens, but
for a number within rounding of a boundary; `decide` then is `begin` and a wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import dispatch
from lorry.kernels.philox import uniforms
from lorry.server.decoding import on_device
from lorry.server.decoding.interface import Continuation, Pending, Row, Strategy
from lorry.server.decoding.lists import listed, token_lists
from lorry.server.decoding.logprobs import token_logprobs
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.rowwise import (
    Doubles,
    Ints,
    argmax,
    cumulative_sums,
    draw,
    first_above,
    nth_equal,
    probabilities,
    top_values,
)

LISTS = (128, 2048)  # how many of the largest values are tried before a row's whole vocabulary is sorted
TINY = np.float32(1e-30)  # keeps a temperature that float32 would round to 0 a divisor


class Sampling(Strategy):
    """The strategy of every request that names no other."""

    def __init__(self, processors: Processors | None = None) -> None:
        self.processors = processors if processors is not None else Processors()

    @torch.inference_mode()
    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """One continuation of one token per row, in order. Overwrites the logits of rows with processors."""
        asking = [place for place, row in enumerate(rows) if row.logprobs is not None]
        if dispatch.on_gpu(logits):
            return self._decide_on_device(rows, logits, bool(asking))
        raw = logits[asking] if asking else None
        self.processors.apply(rows, logits)
        tokens = choose(rows, logits)
        if raw is None:
            return [Continuation(place, (token,)) for place, token in enumerate(tokens)]
        reports = dict(
            zip(
                asking,
                token_logprobs(
                    raw, [tokens[place] for place in asking], [rows[place].logprobs or 0 for place in asking]
                ),
                strict=True,
            )
        )
        return [
            Continuation(place, (token,), (reports[place],) if place in reports else None)
            for place, token in enumerate(tokens)
        ]

    def _decide_on_device(self, rows: Sequence[Row], logits: Tensor, asking: bool) -> list[Continuation]:
        unread = [0] * len(rows)
        if all(self.can_begin(row) for row in rows):
            return self.begin(rows, logits, unread, None).continuations()
        raw = logits.clone() if asking else None
        self.processors.apply(rows, logits)
        return on_device.begin(rows, logits, None, unread, None, raw).continuations()

    def can_begin(self, row: Row) -> bool:
        """True for every row whose processors lists can tell; only processors of another make cannot be."""
        return listed(self.processors, row)

    @torch.inference_mode()
    def begin(self, rows: Sequence[Row], logits: Tensor, unread: Sequence[int], last: Tensor | None) -> Pending:
        """One token per row, enqueued; see `on_device.py`. Overwrites the logits of rows with processors."""
        lists = token_lists(self.processors, rows, unread, logits.shape[1])
        return on_device.begin(rows, logits, lists, unread, last)

    def release(self, key: int) -> None:
        self.processors.release(key)


def choose(rows: Sequence[Row], logits: Tensor) -> list[int]:
    """The next token of each row.

    logits: float32 [R, V] after the processors, without NaN, at least one of each row finite. Not changed.
    """
    plain, truncated, greedy = [], [], []
    for place, row in enumerate(rows):
        sampling = row.sampling
        if sampling.temperature == 0.0:
            greedy.append(place)
        elif sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0:
            truncated.append(place)
        else:
            plain.append(place)
    tokens = np.empty(len(rows), np.int64)
    for places, choice in ((greedy, _greedy), (plain, _plain), (truncated, _truncated)):
        if places:
            part = logits if len(places) == len(rows) else logits[places]
            tokens[places] = choice([rows[place] for place in places], part)
    return [int(token) for token in tokens]


def _greedy(rows: Sequence[Row], logits: Tensor) -> Ints:
    return argmax(logits)


def _plain(rows: Sequence[Row], logits: Tensor) -> Ints:
    return draw(probabilities(logits, _temperatures(rows)), _uniforms(rows))


def _truncated(rows: Sequence[Row], logits: Tensor) -> Ints:
    return truncated_draw(logits, Truncation.of(rows), _uniforms(rows))


class Truncation:
    """Vectors over the rows, [R] each: temperature > 0 · top_k, past any vocabulary when off · top_p ·
    min_p."""

    def __init__(self, temperature: NDArray[np.float32], top_k: Ints, top_p: Doubles, min_p: Doubles) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Truncation:
        return cls(
            _temperatures(rows),
            np.array([row.sampling.top_k or np.iinfo(np.int64).max for row in rows], np.int64),
            np.array([row.sampling.top_p for row in rows], np.float64),
            np.array([row.sampling.min_p for row in rows], np.float64),
        )

    def __getitem__(self, rows: Ints) -> Truncation:
        return Truncation(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def truncated_draw(logits: Tensor, truncation: Truncation, uniform: Doubles) -> Ints:
    """Draw from what top-k, top-p and min-p leave.

    logits: float32 [R, V]; uniform: float64 [R] in [0, 1). Returns int64 [R], token ids.
    """
    rows, vocabulary = logits.shape
    mass = np.full(rows, np.nan)  # Σ exp((z - max z) / T) over the vocabulary, where top-p needs it
    whole = np.flatnonzero((truncation.top_k >= vocabulary) & (truncation.top_p < 1.0))
    if whole.size:
        p = probabilities(_take(logits, whole), truncation.temperature[whole])
        mass[whole] = cumulative_sums(p)[:, -1] / p.amax(dim=1).numpy()
    tokens = np.empty(rows, np.int64)
    left = np.arange(rows)
    for count in LISTS:
        part = _take(logits, left)
        top = top_values(part, count)
        cuts = truncation[left]
        weights = np.exp((top - top[:, :1]).astype(np.float64) / cuts.temperature[:, None])
        kept, decided = _kept(top, weights, cuts, mass[left], complete=top.shape[1] == vocabulary)
        at = np.flatnonzero(decided)
        if at.size:
            rank = _rank(weights[at], kept[at], uniform[left[at]])
            values = top[at, rank]
            nth = rank - np.argmax(top[at] == values[:, None], axis=1)
            tokens[left[at]] = nth_equal(_take(part, at), values, nth)
        left = left[~decided]
        if not left.size:
            return tokens
    p = probabilities(_take(logits, left), truncation.temperature[left])
    tokens[left] = draw(cut(p, truncation[left]), uniform[left])
    return tokens


def cut(p: Tensor, truncation: Truncation) -> Tensor:
    """Zero what is not left, row by row: a row's arrays stay in the cache, and few rows come here.

    p: float32 [R, C]. Returns float32 [R, C].
    """
    left = p.numpy().copy()
    for row, top_k, top_p, min_p in zip(left, truncation.top_k, truncation.top_p, truncation.min_p, strict=True):
        descending = np.sort(row)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)
        least = descending[min(top_k, len(row)) - 1]
        if top_p < 1.0:
            mass = cumulative[np.count_nonzero(descending >= least) - 1]
            nucleus = 1 + np.searchsorted(cumulative, top_p * mass)
            least = max(least, descending[min(nucleus, len(row)) - 1])
        row[row < max(least, np.float32(min_p) * descending[0])] = 0
    return torch.from_numpy(left)


def _kept(
    top: NDArray[np.float32], weights: Doubles, truncation: Truncation, mass: Doubles, complete: bool
) -> tuple[Ints, NDArray[np.bool_]]:
    """How many of each row's largest values are left, and whether the list is long enough to say so.

    top: float32 [R, C] descending; weights: float64 [R, C], exp((top - max) / T); mass: see `truncated_draw`
    complete: the list is the vocabulary
    Returns int64 [R] in 1..C, bool [R].
    """
    listed = top.shape[1]
    cumulative = np.cumsum(weights, axis=1)
    kept = _with_equals(top, np.minimum(truncation.top_k, listed))
    partial = truncation.top_p < 1.0
    known = ~partial | ~np.isnan(mass) | (kept < listed)
    mass = np.where(np.isnan(mass), cumulative[np.arange(len(top)), kept - 1], mass)
    ahead = np.zeros_like(cumulative)
    ahead[:, 1:] = cumulative[:, :-1]
    nucleus = np.maximum((ahead < (truncation.top_p * mass)[:, None]).sum(axis=1), 1)
    kept = np.where(partial, np.minimum(kept, _with_equals(top, nucleus)), kept)
    likely = np.maximum((weights >= truncation.min_p[:, None]).sum(axis=1), 1)
    kept = np.minimum(kept, likely)
    return kept, (kept < listed) & known | complete


def _with_equals(top: NDArray[np.float32], count: Ints) -> Ints:
    """How many of each row's values are at least its `count`-th."""
    least = top[np.arange(len(top)), count - 1]
    return np.asarray((top >= least[:, None]).sum(axis=1))


def _rank(weights: Doubles, kept: Ints, uniform: Doubles) -> Ints:
    """Which of the kept values is drawn, from 0 for the largest."""
    inside = np.where(np.arange(weights.shape[1]) < kept[:, None], weights, 0.0)
    cumulative = np.cumsum(inside, axis=1)
    return first_above(cumulative, uniform * cumulative[:, -1])


def _temperatures(rows: Sequence[Row]) -> NDArray[np.float32]:
    return np.maximum(np.array([row.sampling.temperature for row in rows], np.float32), TINY)


def _uniforms(rows: Sequence[Row]) -> Doubles:
    return uniforms(
        [row.sampling.seed for row in rows],
        [row.index for row in rows],
        [len(row.output_token_ids) for row in rows],
    )


def _take(logits: Tensor, rows: Ints) -> Tensor:
    return logits if len(rows) == len(logits) else logits[torch.from_numpy(rows)]
