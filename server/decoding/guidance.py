"""Guidance: an answer is moved away from what another prompt, or the base without adapters, would say.

    log p'[t] = log n[t] + g (log p[t] - log n[t])  + a constant

p is the distribution behind the prompt and the answer so far, n that behind the negative prompt, or behind the same
prompt without the adapters, and the same answer. g = 1 is p itself, g > 1 is further away from n, between 0 and 1 lies
what is between the two. With the base as n it is base + g (adapter - base): how much of the adapter is in the answer,
in distributions where an adapter's weight says it in weights.

Processors, cuts and the draw then see p' as they would see p, and log-probabilities and entropy are of p'. A request is
two rows: its own, and a shadow that holds the other prompt, takes the same tokens and is never told.

Sources: Sanchez et al. 2023, "Stay on topic with classifier-free guidance", arXiv:2306.17806, as
transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor has it; Ho & Salimans 2022; for adapters Liu et al. 2021,
"DExperts", arXiv:2105.03023, with the base as the anti-expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.params import Guidance


def guided(logits: Tensor, negative: Tensor, scales: Tensor) -> Tensor:
    """log p' but for a constant of each row; logits, negative: float32 [R, V], scales: float32 [R]."""
    towards, away = logits.log_softmax(1), negative.log_softmax(1)
    impossible = torch.isinf(towards) | torch.isinf(away)
    return torch.where(impossible, towards, torch.lerp(away, towards, scales[:, None]))


class Guiding(Strategy):
    """Pairs of rows, of which another strategy chooses for the first."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    @torch.inference_mode()
    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """rows: of each group index 0, which is the answer's, and index 1, its shadow."""
        places = {(row.group, row.index): place for place, row in enumerate(rows)}
        mains = [place for place, row in enumerate(rows) if row.index == 0]
        shadows = [places[rows[place].group, 1] for place in mains]
        scales = torch.tensor([_scale(rows[place]) for place in mains], device=logits.device)
        mixed = guided(logits[mains], logits[shadows], scales)
        continuations: list[Continuation] = []
        for way in self.inner.decide([rows[place] for place in mains], mixed):
            continuations.append(replace(way, parent=mains[way.parent]))
            continuations.append(Continuation(shadows[way.parent], way.token_ids))
        return sorted(continuations, key=lambda way: way.parent)

    def release(self, key: int) -> None:
        """Nothing is kept here."""


def _scale(row: Row) -> float:
    assert isinstance(row.sampling.search, Guidance)
    return row.sampling.search.scale
