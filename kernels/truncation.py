"""A draw from what truncation leaves of a row, on the CPU: all cuts and the draw in one pass of C for each row.

The cuts are those of `lorry.server.decoding.cuts`, in the order of `COLUMNS`; that room has their equations, and does
the same in torch. Rows do not sort the vocabulary: the largest 128 values are tried first; if what is left lies beyond
them, or a cut needs sums that they do not tell, the largest 2048; only then all. A draw goes through what is left in
the order of falling z; in the order of the token ids in a row that has all sorted, if 2048 tokens or more are left or
it has no cuts but top-k, top-p and min-p.

Sums are float64 from the largest down, but for those of whole rows (`lorry.kernels.vocabulary`). How a row is done
depends on that row only, so that its draw has the same bits in any batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import native

COLUMNS = ("temperature", "top_n_sigma", "top_k", "top_p", "min_p", "typical_p", "epsilon", "eta")
OFF = (1.0, 0.0, np.inf, 1.0, 0.0, 1.0, 0.0, 0.0)


def truncated_draw(logits: Tensor, cuts: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """logits: float32 [R, V] for which `lorry.kernels.vocabulary.serves`, without NaN; cuts: float64 [R, 8], the
    `COLUMNS`, a temperature above 0; uniforms: float64 [R] in [0, 1). Returns int64 [R], token ids.
    """
    library = native.library()
    assert library is not None and cuts.shape == (len(logits), len(COLUMNS)) and uniforms.shape == cuts.shape[:1]
    cuts, uniforms = np.ascontiguousarray(cuts, np.float64), np.ascontiguousarray(uniforms, np.float64)
    tokens = np.empty(len(logits), np.int64)
    pointers = cuts.ctypes.data, uniforms.ctypes.data, tokens.ctypes.data
    native.check(library.truncated_draw(logits.data_ptr(), *logits.shape, *pointers))
    return tokens
