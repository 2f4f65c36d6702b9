"""Epsilon sampling: tokens of at least a given probability.

    keep t  when  p[t] >= ε        and always the most likely

Source: Hewitt et al. 2022 (arXiv:2210.15191), as transformers' EpsilonLogitsWarper.
"""

from __future__ import annotations

from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, epsilon: Tensor) -> None:
    """epsilon: float64 [R], above 0, below 1."""
    left.shorten((left.weights >= (epsilon * left.mass())[:, None]).sum(1))
