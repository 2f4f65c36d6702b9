"""Locally typical sampling: the tokens whose surprise is nearest to the entropy.

    d[t] = | -log p[t] - H |        keep the fewest tokens of smallest d whose probability reaches typical_p

and those whose d equals the last one's. The likeliest token may be cut: the only cut from above. Source: Meister et al.
2022 (arXiv:2202.00666), as transformers' TypicalLogitsWarper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, mass: Tensor) -> None:
    """mass: float64 [R], typical_p, above 0, below 1."""
    total = left.mass()
    log_total = total.log()
    entropy = log_total - left.energy() / total
    surprise = log_total[:, None] - left.scaled
    inside = left.inside()
    distance = torch.where(inside, (surprise - entropy[:, None]).abs(), torch.inf)
    nearest = distance.argsort(dim=1)  # equals in any order: they stay or go together
    cumulative = torch.where(inside, left.weights, 0.0).gather(1, nearest).cumsum(1)
    last = (cumulative < (mass * total)[:, None]).sum(1).clamp(max=distance.shape[1] - 1)
    limit = distance.gather(1, nearest).gather(1, last[:, None])
    kept = inside & (distance <= limit)
    start, sound = kept.to(torch.uint8).argmax(1), kept.any(1)  # not in a row of -inf
    left.end = torch.where(sound, start + kept.sum(1), left.end)
    left.start = torch.where(sound, start, left.start)
