"""Min-p: tokens that are at least a share as likely as the most likely one.

    keep t  when  p[t] >= min_p · max p

The sum of the probabilities cancels out. Source: Nguyen et al. 2024 (arXiv:2407.01082), as transformers'
MinPLogitsWarper.
"""

from __future__ import annotations

from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, min_p: Tensor) -> None:
    """min_p: float64 [R], above 0, to 1. Comes before any cut from above."""
    left.shorten((left.weights >= min_p[:, None]).sum(1))
