"""DoLa, decoding by contrasting layers: what the model has learnt in its last layers counts, what it knew before does
not.

    M = argmax over candidate layers j of JSD(p_N, p_j)
    z'[t] = log p_N[t] - log p_M[t]     where p_N[t] >= 0.1 · max p_N, else
            log p_N[t] - 10000

p_N is the model's distribution, p_j = softmax(Head · h_j) of the stream h_j behind j layers (h_0: the embedding),
without the last norm, as the authors' code has it; JSD(p, q) = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2. The
processors and all that follows see z' as logits.

The paper gives a token outside of the head -inf. Here it comes where a ban or a grammar leaves nothing of the head, and
then as likely as in p_N among what is left; otherwise its probability is 0 in float32 too.

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


def divergence(own: Tensor, others: Tensor) -> Tensor:
    """Jensen–Shannon divergence of `own` [V] from each of `others` [J, V], all log-probabilities; float32 [J], nats."""
    mixed = torch.logaddexp(own, others) - math.log(2)
    return (_kl(own, mixed) + _kl(others, mixed)) / 2


def _kl(p: Tensor, m: Tensor) -> Tensor:
    """Σ p log (p / m); what is impossible adds nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - m), 0.0).sum(1)
