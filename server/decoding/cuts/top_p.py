"""Top-p, the nucleus: the smallest set of most likely tokens that has probability p.

    keep t  when  Σ p over tokens with larger z  <  top_p

Of what is left by then; tokens of equal z are kept or dropped together, where in transformers' TopPLogitsWarper their
order is accidental. Source: Holtzman et al. 2020 (arXiv:1904.09751).
"""

from __future__ import annotations

from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, p: Tensor) -> None:
    """p: float64 [R], above 0, below 1. Comes before any cut from above."""
    ahead = left.mass_to - left.weights
    nucleus = (ahead < (p * left.mass())[:, None]).sum(1).clamp(min=1)
    left.shorten(left.up_to_equals(nucleus))
