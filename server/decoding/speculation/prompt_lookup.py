"""Prompt lookup: what followed the last tokens when they stood in the text before is proposed again.

    m = the longest match: the largest m ≤ LONGEST with t[i-m+1..i] = t[L-m..L-1] for some i < L-1; the last such i
    d[j] = t[i + 1 + (j mod (L-1-i))],  j = 0 … min(limit, STRETCH · m) - 1,  if m ≥ SHORTEST

A text that repeats itself with a period is continued with it: the copy reads what it has just written. A long match
promises more than a short one, so it may propose more.

Sources: Saxena 2023 (prompt lookup decoding); Oliaro et al. 2024 (SuffixDecoding: proposals in proportion to the
match).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHORTEST = 2
LONGEST = 16
STRETCH = 3


def look_up(tokens: NDArray[np.int32], limit: int) -> list[int]:
    """At most `limit` tokens that may follow int32 [L]; [] where nothing fits."""
    last = len(tokens) - 1
    if limit < 1 or last < SHORTEST:
        return []
    ends = np.flatnonzero(tokens[:last] == tokens[last])
    length = 0
    while len(ends):
        found, length = ends, length + 1
        if length == LONGEST:
            break
        ends = ends[ends >= length]
        ends = ends[tokens[ends - length] == tokens[last - length]]
    if length < SHORTEST:
        return []
    end = int(found[-1])
    count = min(limit, STRETCH * length)
    return np.resize(tokens[end + 1 :], count).tolist()
