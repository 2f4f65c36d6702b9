"""Contrastive search: likely tokens that do not make the text turn in circles.

    x[t] = argmax over the top_k most likely v of  (1 - α) · p(v | x[<t]) - α · max over j < t of cos(h(v), h(x[j]))

p is the softmax of the logits after the processors; h the hidden states that the logits are computed from, of the
prompt's tokens too; h(v) that of v behind x[<t]. Source: Su et al. 2022, arXiv:2202.06417; α is penalty_alpha.

h(v) is known when v has been run, so a step runs the candidates of one place, chooses among them, and takes from the
logits of the chosen one the candidates of the next place. Each costs a row of the batch; they share all blocks but the
last.

Memory: 4 · hidden_size bytes for each token of the text, beside its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.decoding.largest import largest
from lorry.server.decoding.logprobs import token_logprobs
from lorry.server.decoding.processors import Processors
from lorry.server.params import ContrastiveSearch, TokenLogprobs


class Text:
    """What one search keeps: the directions of the hidden states so far, and the probabilities of its candidates.

    candidates: by key of the sequence; forks: of forks to come, by parent; decided: the length of the text then, and
    what was decided
    """

    def __init__(self) -> None:
        self._directions = torch.empty(0, 0)
        self.length = 0
        self.candidates: dict[int, float] = {}
        self.forks: dict[int, list[float]] = {}
        self.decided = -1, list[Continuation]()

    @property
    def directions(self) -> Tensor:
        """float32 [length, H], unit vectors."""
        return self._directions[: self.length]

    def append(self, directions: Tensor) -> None:
        """directions: float32 [T, H]"""
        end = self.length + len(directions)
        if end > len(self._directions):
            grown = directions.new_empty(max(end, 2 * self.length), directions.shape[1])
            if self.length:
                grown[: self.length] = self.directions
            self._directions = grown
        self._directions[self.length : end] = directions
        self.length = end


class ContrastiveSearching(Strategy):
    """The strategy of requests whose search is a `ContrastiveSearch`."""

    def __init__(self, processors: Processors) -> None:
        self.processors = processors
        self._texts: dict[int, Text] = {}  # by key of each sequence

    @torch.inference_mode()
    def observe(self, key: int, hidden_states: Tensor) -> None:
        self._texts.setdefault(key, Text()).append(_directions(hidden_states))

    @torch.inference_mode()
    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """The candidates behind the chosen row of each search, held. Changes no logits."""
        assert hidden_states is not None
        chosen: list[int] = []  # of each search that was not decided before
        decided: dict[int, list[Continuation]] = {}  # by the first row of the search
        firsts: list[int] = []
        for _, members in groupby(range(len(rows)), key=lambda place: rows[place].group):
            places = list(members)
            text = self._texts[rows[places[0]].key]
            if text.decided[0] == len(rows[places[0]].output_token_ids):
                decided[places[0]] = text.decided[1]
                continue
            own = slice(places[0], places[-1] + 1)
            firsts.append(places[0])
            chosen.append(places[0] + self._choose(text, rows[own], hidden_states[own]))
        if chosen:
            picked = [rows[place] for place in chosen]
            raw = logits[chosen]
            processed = raw.clone()
            self.processors.apply(picked, processed)
            for place, first, row, own_raw, own_logits in zip(chosen, firsts, picked, raw, processed, strict=True):
                decided[first] = self._candidates(row, place - first, own_raw, own_logits)
        return [replace(way, parent=way.parent + first) for first in sorted(decided) for way in decided[first]]

    def forked(self, parent: int, child: int) -> None:
        text = self._texts.get(parent)
        if text is not None:
            self._texts[child] = text
            text.candidates[child] = text.forks[parent].pop(0)

    def release(self, key: int) -> None:
        text = self._texts.pop(key, None)
        if text is not None:
            text.candidates.pop(key, None)

    @staticmethod
    def _choose(text: Text, rows: Sequence[Row], hidden_states: Tensor) -> int:
        """The candidate that is taken, whose state joins the text; behind the prompt its only row.

        hidden_states: [C, H]
        """
        if not text.candidates:
            return 0
        search = rows[0].sampling.search
        assert isinstance(search, ContrastiveSearch)
        directions = _directions(hidden_states)
        probabilities = torch.tensor([text.candidates[row.key] for row in rows])
        similarity = (directions @ text.directions.T).amax(dim=1).cpu()
        scores = (1.0 - search.penalty_alpha) * probabilities - search.penalty_alpha * similarity
        best = int(scores.argmax())
        text.append(directions[best : best + 1])
        return best

    def _candidates(self, row: Row, parent: int, raw: Tensor, logits: Tensor) -> list[Continuation]:
        """The tokens that are tried next; raw, logits: float32 [V], before and after the processors."""
        search, text = row.sampling.search, self._texts[row.key]
        assert isinstance(search, ContrastiveSearch)
        _, tokens = largest(logits, search.top_k)
        if not len(tokens):
            raise ValueError("no token has a probability above 0")
        ids = torch.from_numpy(tokens).to(logits.device)
        probabilities = torch.softmax(logits, dim=0)[ids].tolist()
        reports: list[tuple[TokenLogprobs, ...] | None] = [None] * len(tokens)
        if row.logprobs is not None:
            count = len(tokens)
            reports = [
                (each,)
                for each in token_logprobs(
                    raw.expand(count, -1), tokens.tolist(), [row.logprobs] * count, [row.entropy] * count
                )
            ]
        ways = [
            Continuation(parent, (token_id,), report, held=1)
            for token_id, report in zip(tokens.tolist(), reports, strict=True)
        ]
        text.candidates, text.forks = {row.key: probabilities[0]}, {row.key: probabilities[1:]}
        text.decided = len(row.output_token_ids), ways
        return ways


def _directions(hidden_states: Tensor) -> Tensor:
    """h / ‖h‖ in float32."""
    return torch.nn.functional.normalize(hidden_states.float(), dim=-1)
