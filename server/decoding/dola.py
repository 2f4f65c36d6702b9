"""DoLa, decoding by contrasting layers: what the model has learnt in its last layers counts, what it knew before does
not.

    M = argmax over candidate layers j of JSD(p_N, p_j)
    z'[t] = log p_N[t] - log p_M[t]     where p_N[t] >= 0.1 · max p_N, else
            log p_N[t] - 10000

p_N is the model's distribution, p_j = softmax(Head · h_j) of the stream h_j behind j layers (h_0: the embedding),
without the last norm, as the authors' code has it; JSD(p, q) = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2. z' are
the logits that log-probabilities are of.

The paper gives a token outside of the head -inf. So does `narrowed`, behind the processors, unless a ban or a grammar
has left nothing of the head: then p_N decides among what is left. The processors see log p_N outside of the head
(`lifted`): a repetition penalty on log p_N[t] - 10000 would be a ban.

Source: Chuang et al. 2023, arXiv:2309.03883. transformers had it as `dola_layers`, with the mean divergence of a batch
and with KL(m, p) for KL(p, m).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELATIVE_TOP = 0.1
OUTSIDE = 10000.0


def contrasted(logits: Tensor, early: Tensor) -> Tensor:
    """z' of one row.

    logits: float32 [V], the model's; early: float32 [J, V], of the candidate layers
    """
    own, others = logits.log_softmax(0), early.log_softmax(1)
    layer = int(divergence(own, others).argmax()) if len(others) > 1 else 0
    head = own >= own.max() + math.log(RELATIVE_TOP)
    return torch.where(head, own - others[layer], own - OUTSIDE)


def lifted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """z' with log p_N, to 0.0005, outside of the head, and whether a token is outside.

    scores: float32 [R, V], z' of R rows
    """
    outside = scores < -OUTSIDE / 2
    return torch.where(outside, scores + OUTSIDE, scores), outside


def narrowed(scores: Tensor, outside: Tensor) -> Tensor:
    """-inf for what is outside of the head, in rows that have something of it left.

    scores: float32 [R, V], what the processors made of `lifted`'s; outside: bool [R, V]
    """
    left = (~outside & (scores > -torch.inf)).any(1, keepdim=True)
    return scores.masked_fill(outside & left, -torch.inf)


def divergence(own: Tensor, others: Tensor) -> Tensor:
    """Jensen–Shannon divergence of `own` [V] from each of `others` [J, V], all log-probabilities; float32 [J], nats."""
    mixed = torch.logaddexp(own, others) - math.log(2)
    return (_kl(own, mixed) + _kl(others, mixed)) / 2


def _kl(p: Tensor, m: Tensor) -> Tensor:
    """Σ p log (p / m); what is impossible adds nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - m), 0.0).sum(1)
