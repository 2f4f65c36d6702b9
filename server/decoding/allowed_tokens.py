"""Allowed tokens: nothing else may come.

    z[t] = -inf  for t outside the set

As transformers' PrefixConstrainedLogitsProcessor with the same set at every prefix. A set that lacks every
end-of-sequence token goes on until another limit ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.server.decoding.scatter import Ids, flat


def restrict(logits: Tensor, places: Sequence[int], allowed: Sequence[Ids]) -> None:
    """Forbid the rows at `places` all but their tokens, in place.

    logits: float32 [R, V], contiguous. Raises IndexError for ids outside the vocabulary.
    """
    _, at = flat(logits, places, allowed)
    restrict_at(logits, torch.tensor(list(places), device=logits.device), at)


def restrict_at(logits: Tensor, rows: Tensor, at: Tensor, zeroed: Tensor | None = None) -> None:
    """As `restrict`, without a look at a value.

    rows: int64 [A]; at: int64 [E], what those rows may hold, as places in the logits as one vector; zeroed: bool [E],
    those that get 0
    """
    vector = logits.view(-1)
    kept = vector[at]
    if zeroed is not None:
        kept = kept.masked_fill(zeroed, 0.0)
    logits.index_fill_(0, rows, -torch.inf)
    vector[at] = kept
