"""Logit bias: a number added to the logits of single tokens.

    z[t] += bias[t]

Source: OpenAI's API; equal to transformers' SequenceBiasLogitsProcessor on sequences of one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lorry.server.decoding.interface import Row
from lorry.server.decoding.scatter import Entries, flat, tensor


class LogitBias:
    """Raises IndexError for ids outside the vocabulary: the frontend refuses them."""

    def __init__(self) -> None:
        self._bias: dict[int, Entries] = {}

    def applies(self, row: Row) -> bool:
        return bool(row.sampling.logit_bias)

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        parts = [self.entries(row) for row in rows]
        vector, at = flat(logits, places, [ids for ids, _ in parts])
        vector[at] += tensor(np.concatenate([bias for _, bias in parts]), logits)

    def release(self, key: int) -> None:
        self._bias.pop(key, None)

    def entries(self, row: Row) -> Entries:
        """The row's tokens with a bias, and the biases."""
        if row.key not in self._bias:
            bias = row.sampling.logit_bias
            self._bias[row.key] = np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)
        return self._bias[row.key]
