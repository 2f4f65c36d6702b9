"""A minimum of tokens: what would end the sequence is forbidden while the output is too short.

    z[t] = -inf  for end-of-sequence and stop ids  while  len(output) < min_new_tokens

As transformers' MinNewTokensLengthLogitsProcessor. End-of-sequence ids that the request ignores stay free.
"""

from __future__ import annotations

import numpy as np

from lorry.server.decoding.interface import Row
from lorry.server.decoding.scatter import NO_IDS, Ids


def forbidden(row: Row, length: int, vocabulary: int) -> Ids:
    """What must not come next; length: tokens of the output."""
    return ending(row, vocabulary) if length < row.stopping.min_new_tokens else NO_IDS


def ending(row: Row, vocabulary: int) -> Ids:
    """The token ids inside the vocabulary that can end the sequence; possibly twice."""
    eos = () if row.stopping.ignore_eos else row.eos_token_ids
    return np.array([t for t in (*eos, *row.stopping.stop_token_ids) if t < vocabulary], np.int32)
