"""The largest of many scores, with a rule for equals, wherever the scores are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import dispatch
from lorry.server.decoding.logprobs import first_largest
from lorry.server.decoding.rowwise import Ints, top_values


def largest(scores: Tensor, count: int) -> tuple[NDArray[np.float32], Ints]:
    """The `count` largest of all scores, falling, of equals the first; without -inf and NaN, so they may be fewer.

    scores: float32 [...], taken as one vector. Returns float32 [C], int64 [C], the values and where they lie.
    """
    flat = scores.reshape(1, -1)
    count = min(count, flat.shape[1])
    if dispatch.on_gpu(scores):
        at = first_largest(flat, count)
        values, places = flat.gather(1, at)[0].cpu().numpy(), at[0].cpu().numpy()
        finite = values > -np.inf
        return values[finite], places[finite]
    listed = flat[0].numpy()
    least = top_values(flat, count)[0, -1]
    places = np.flatnonzero((listed >= least) & (listed > -np.inf))
    order = np.argsort(-listed[places], kind="stable")[:count]
    return listed[places[order]], places[order]
