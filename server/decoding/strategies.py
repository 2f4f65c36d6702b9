"""Each row to the strategy that its request names: one call for each strategy that a step has rows of.

A step without a search costs one look at each row. On a GPU only such steps are begun: one with rows of a search is
decided on the host, the other rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorry.server.decoding.beam import BeamSearching
from lorry.server.decoding.contrastive import ContrastiveSearching
from lorry.server.decoding.guidance import Guiding
from lorry.server.decoding.interface import Continuation, Pending, Row, Strategy
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.sampling import Sampling
from lorry.server.params import BeamSearch, ContrastiveSearch, Guidance


class Strategies(Strategy):
    """All strategies over one chain of processors."""

    def __init__(self, processors: Processors | None = None) -> None:
        self.processors = processors if processors is not None else Processors()
        self.sampling = Sampling(self.processors)
        self.searches: dict[type, Strategy] = {
            BeamSearch: BeamSearching(self.processors),
            ContrastiveSearch: ContrastiveSearching(self.processors),
            Guidance: Guiding(self.sampling),
        }

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """As `Strategy.decide`; each strategy gets its rows in one call."""
        if all(row.sampling.search is None for row in rows):
            return self.sampling.decide(rows, logits)
        places: dict[Strategy, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(self._of(row), []).append(place)
        continuations: list[Continuation] = []
        for strategy, own in places.items():
            if len(own) == len(rows):
                return strategy.decide(rows, logits, hidden_states)
            at = torch.tensor(own, device=logits.device)
            hidden = None if hidden_states is None else hidden_states[at]
            ways = strategy.decide([rows[place] for place in own], logits[at], hidden)
            continuations += [replace(way, parent=own[way.parent]) for way in ways]
        return sorted(continuations, key=lambda way: way.parent)

    def can_begin(self, row: Row) -> bool:
        return row.sampling.search is None and self.sampling.can_begin(row)

    def begin(self, rows: Sequence[Row], logits: Tensor, unread: Sequence[int], last: Tensor | None) -> Pending:
        return self.sampling.begin(rows, logits, unread, last)

    def observe(self, key: int, hidden_states: Tensor) -> None:
        self.searches[ContrastiveSearch].observe(key, hidden_states)

    def conclude(self, rows: Sequence[Row]) -> list[Continuation]:
        return self._of(rows[0]).conclude(rows)

    def forked(self, parent: int, child: int) -> None:
        for strategy in (self.sampling, *self.searches.values()):
            strategy.forked(parent, child)

    def release(self, key: int) -> None:
        for strategy in (self.sampling, *self.searches.values()):
            strategy.release(key)

    def _of(self, row: Row) -> Strategy:
        search = row.sampling.search
        return self.sampling if search is None else self.searches[type(search)]
