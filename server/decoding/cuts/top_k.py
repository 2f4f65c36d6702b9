"""Top-k: the k most likely tokens, and those that are as likely as the k-th.

    keep t  when  z[t] >= the k-th largest z

Source: Fan et al. 2018 (arXiv:1805.04833), ties as in transformers' TopKLogitsWarper.
"""

from __future__ import annotations

from torch import Tensor

from lorry.server.decoding.cuts.left import Left


def cut(left: Left, k: Tensor) -> None:
    """k: float64 [R], whole numbers, >= 1."""
    left.shorten(left.up_to_equals(k.clamp(max=left.values.shape[1]).long()))
