"""Top-nσ: a threshold below the largest logit, in standard deviations of the row.

    keep t  when  z[t] >= max z - n σ        σ² = (1/V) Σ (z - mean z)²

Over the V tokens that are not forbidden. It does not depend on the temperature, since max z - z and σ are divided by it
alike. Source: Tang et al. 2024 (arXiv:2411.07641); forbidden tokens are left out as in llama.cpp. transformers has
none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, n: Tensor) -> None:
    """n: float64 [R], > 0. Comes first."""
    distance = (left.values - left.values[:, :1]).double()
    left.shorten((distance >= -(n * left.sigma)[:, None]).sum(1))


def deviation(logits: Tensor) -> Tensor:
    """σ of each row; float32 [R, V] -> float64 [R]. -inf is left out; 0 for a row that has nothing else."""
    finite = logits > -torch.inf
    z = torch.where(finite, logits, 0.0).double()
    count = finite.sum(1).clamp(min=1)
    mean = z.sum(1) / count
    return (torch.where(finite, z - mean[:, None], 0.0).square().sum(1) / count).sqrt()
