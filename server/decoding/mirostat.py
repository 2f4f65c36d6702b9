"""Mirostat v2: a threshold on surprise that follows what was drawn.

    s[t] = -log2 p[t]        keep t  when  s[t] <= μ,  and always the most likely
    after token x:           μ ← μ - η (s[x] - τ)         μ = 2 τ at first

p is the distribution at the row's temperature after the processors, of the whole vocabulary, in the cut and in the
surprise of what was drawn alike. The cut is an epsilon cut with ε = 2^-μ (`cuts/epsilon.py`), so the rest is state.

Source: Basu et al. 2021 (arXiv:2007.14966), Mirostat 2.0, and its authors' code, whose surprise is of the untruncated
distribution. llama.cpp takes that of what the cut left, renormalised, and so drifts to larger μ.

μ depends on probabilities, which the tokens do not tell, so it is kept by the row's key; a fork gets its parent's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorry.server.decoding.interface import Row

Doubles = NDArray[np.float64]


class Mirostat:
    """μ of every row that asks for it."""

    def __init__(self) -> None:
        # key -> position, μ there, μ behind it: a position may be decided twice, with the same μ
        self._state: dict[int, tuple[int, float, float]] = {}

    def epsilon(self, rows: Sequence[Row]) -> Doubles:
        """2^-μ of each row, float64 [R]."""
        return np.exp2([-self._mu(row) for row in rows])

    def observe(self, rows: Sequence[Row], surprise: Doubles) -> None:
        """Move μ; surprise: float64 [R], in bits, of the tokens that were drawn."""
        for row, bits in zip(rows, surprise.tolist(), strict=True):
            assert row.sampling.mirostat is not None
            mu, settings = self._mu(row), row.sampling.mirostat
            self._state[row.key] = (len(row.output_token_ids), mu, mu - settings.eta * (bits - settings.tau))

    def forked(self, parent: int, child: int) -> None:
        if parent in self._state:
            self._state[child] = self._state[parent]

    def release(self, key: int) -> None:
        self._state.pop(key, None)

    def _mu(self, row: Row) -> float:
        assert row.sampling.mirostat is not None
        position = len(row.output_token_ids)
        before, mu, behind = self._state.get(row.key, (position, 2 * row.sampling.mirostat.tau, 0.0))
        return mu if before == position else behind
