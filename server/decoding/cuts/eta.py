"""Eta sampling: an epsilon that falls where the distribution is flat.

    η = min(ε, √ε · exp(-H))        keep t  when  p[t] >= η        and always the most likely

Source: Hewitt et al. 2022 (arXiv:2210.15191), as transformers' EtaLogitsWarper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, epsilon: Tensor) -> None:
    """epsilon: float64 [R], above 0, below 1."""
    mass = left.mass()
    entropy = mass.log() - left.energy() / mass
    eta = torch.minimum(epsilon, epsilon.sqrt() * (-entropy).exp())
    left.shorten((left.weights >= (eta * mass)[:, None]).sum(1))
