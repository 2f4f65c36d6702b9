"""Greedy decoding and sampling: one token per row.

    logits → processors → p[t] ∝ exp(z[t] / T) on what the truncation leaves → one token

`processors.py` has the order of what changes logits, `truncation.py` the order of what cuts the distribution; both are
transformers' where it has the step.

A row's draw depends on its logits and (seed, index, number of tokens it has put out), see `lorry.kernels.philox`: one
uniform number u per token, inverted through the cumulative distribution, in the order of falling z (truncated
rows) or of token ids (plain rows). T = 0 is argmax: the smallest id among equals, whatever the cuts are, since all of
them keep the one token that is left of p.

That is the CPU's way, in this file, `truncation.py` and `rowwise.py`. On a GPU `lorry.kernels.sampling` draws the same
tokens, but for a number within rounding of a boundary; `decide` then is `begin` and a wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import dispatch
from lorry.kernels.philox import uniforms
from lorry.server.decoding import dola, on_device
from lorry.server.decoding.interface import Continuation, Pending, Row, Strategy
from lorry.server.decoding.lists import listed, token_lists
from lorry.server.decoding.logprobs import token_logprobs
from lorry.server.decoding.mirostat import Mirostat
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.rowwise import Doubles, Ints, argmax, likelihoods, plain_draw
from lorry.server.decoding.truncation import TINY, Truncation, truncated, truncated_draw


class Sampling(Strategy):
    """The strategy of every request that names no other."""

    def __init__(self, processors: Processors | None = None) -> None:
        self.processors = processors if processors is not None else Processors()
        self.mirostat = Mirostat()

    @torch.inference_mode()
    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """One continuation of one token per row, in order. Overwrites the logits of rows with processors or DoLa."""
        asking = [place for place, row in enumerate(rows) if row.logprobs is not None]
        if dispatch.on_gpu(logits):
            return self._decide_on_device(rows, logits, bool(asking))
        raw = logits[asking] if asking else None
        self._process(rows, logits)
        tokens = choose(rows, logits, self.mirostat)
        if raw is None:
            return [Continuation(place, (token,)) for place, token in enumerate(tokens)]
        asked = [rows[place] for place in asking]
        found = token_logprobs(
            raw,
            [tokens[place] for place in asking],
            [row.logprobs or 0 for row in asked],
            [row.entropy for row in asked],
        )
        reports = dict(zip(asking, found, strict=True))
        return [
            Continuation(place, (token,), (reports[place],) if place in reports else None)
            for place, token in enumerate(tokens)
        ]

    def _process(self, rows: Sequence[Row], logits: Tensor) -> None:
        """The processors, in place; contrasted rows are narrowed to their head behind them."""
        contrasted = [place for place, row in enumerate(rows) if row.sampling.dola is not None]
        if not contrasted:
            self.processors.apply(rows, logits)
            return
        logits[contrasted], outside = dola.lifted(logits[contrasted])
        self.processors.apply(rows, logits)
        logits[contrasted] = dola.narrowed(logits[contrasted], outside)

    def _decide_on_device(self, rows: Sequence[Row], logits: Tensor, asking: bool) -> list[Continuation]:
        unread = [0] * len(rows)
        if all(self.can_begin(row) for row in rows):
            return self.begin(rows, logits, unread, None).continuations()
        raw = logits.clone() if asking else None
        self._process(rows, logits)
        steered = [place for place, row in enumerate(rows) if _is_steered(row)]
        chosen = [rows[place] for place in steered]
        epsilons = dict(zip(steered, self.mirostat.epsilon(chosen).tolist(), strict=True))
        before = logits[steered]
        found = on_device.begin(rows, logits, None, unread, None, raw, epsilons).continuations()
        if steered:
            scaled = before / torch.from_numpy(_temperatures(chosen)).to(before.device)[:, None]
            logprobs = scaled.log_softmax(1).cpu().numpy().astype(np.float64)
            tokens = [found[place].token_ids[0] for place in steered]
            self.mirostat.observe(chosen, -logprobs[np.arange(len(chosen)), tokens] / np.log(2))
        return found

    def can_begin(self, row: Row) -> bool:
        """True for every row whose processors lists can tell, and that is not narrowed behind them. Mirostat's next
        threshold depends on the token's probability, which the host has to read."""
        return listed(self.processors, row) and not _is_steered(row) and row.sampling.dola is None

    @torch.inference_mode()
    def begin(self, rows: Sequence[Row], logits: Tensor, unread: Sequence[int], last: Tensor | None) -> Pending:
        """One token per row, enqueued; see `on_device.py`. Overwrites the logits of rows with processors."""
        lists = token_lists(self.processors, rows, unread, logits.shape[1])
        return on_device.begin(rows, logits, lists, unread, last)

    def forked(self, parent: int, child: int) -> None:
        self.mirostat.forked(parent, child)

    def release(self, key: int) -> None:
        self.processors.release(key)
        self.mirostat.release(key)


def choose(rows: Sequence[Row], logits: Tensor, mirostat: Mirostat | None = None) -> list[int]:
    """The next token of each row.

    logits: float32 [R, V] after the processors, without NaN, at least one of each row finite. Not changed.
    mirostat: where the state of rows that use it is; None: at its beginning
    """
    plain, cut, steered, greedy = [], [], [], []
    for place, row in enumerate(rows):
        sampling = row.sampling
        if sampling.temperature == 0.0:
            greedy.append(place)
        elif _is_steered(row):
            steered.append(place)
        elif truncated(row):
            cut.append(place)
        else:
            plain.append(place)
    tokens = np.empty(len(rows), np.int64)
    for places, choice in ((greedy, _greedy), (plain, _plain), (cut, _truncated)):
        if places:
            tokens[places] = choice([rows[place] for place in places], _part(logits, places))
    if steered:
        chosen = [rows[place] for place in steered]
        tokens[steered] = _steered(chosen, _part(logits, steered), mirostat or Mirostat())
    return [int(token) for token in tokens]


def _is_steered(row: Row) -> bool:
    return row.sampling.mirostat is not None and row.sampling.temperature > 0


def _part(logits: Tensor, places: Sequence[int]) -> Tensor:
    return logits if len(places) == len(logits) else logits[list(places)]


def _greedy(rows: Sequence[Row], logits: Tensor) -> Ints:
    return argmax(logits)


def _plain(rows: Sequence[Row], logits: Tensor) -> Ints:
    return plain_draw(logits, _temperatures(rows), _uniforms(rows))


def _truncated(rows: Sequence[Row], logits: Tensor) -> Ints:
    return truncated_draw(logits, Truncation.of(rows), _uniforms(rows))


def _steered(rows: Sequence[Row], logits: Tensor, mirostat: Mirostat) -> Ints:
    cuts = Truncation.of(rows).with_epsilon(range(len(rows)), mirostat.epsilon(rows))
    tokens = truncated_draw(logits, cuts, _uniforms(rows))
    p = likelihoods(logits, _temperatures(rows), tokens)
    mirostat.observe(rows, -np.log2(np.maximum(p, np.finfo(np.float32).tiny)))
    return tokens


def _temperatures(rows: Sequence[Row]) -> NDArray[np.float32]:
    return np.maximum(np.array([row.sampling.temperature for row in rows], np.float32), TINY)


def _uniforms(rows: Sequence[Row]) -> Doubles:
    return uniforms(
        [row.sampling.seed for row in rows],
        [row.index for row in rows],
        [len(row.output_token_ids) for row in rows],
    )
