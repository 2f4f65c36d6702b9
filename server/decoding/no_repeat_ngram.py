"""No-repeat-ngram: no n tokens in a row may come twice.

    z[t] = -inf  where  (the last n - 1 tokens, t)  is in the text, prompt included

Source: Paulus et al. 2017 (arXiv:1705.04304), as transformers' NoRepeatNGramLogitsProcessor.
"""

from __future__ import annotations

import numpy as np

from lorry.server.decoding.scatter import NO_IDS, Ids


def forbidden(tokens: Ids, n: int) -> Ids:
    """What must not come next, possibly twice. tokens: int32 [L], the text so far; n >= 1."""
    if len(tokens) < n:
        return NO_IDS
    if n == 1:
        return tokens
    places = np.flatnonzero(tokens[n - 2 : -1] == tokens[-1]) + n - 2  # of the last token before t
    for back in range(1, n - 1):
        if not places.size:
            break
        places = places[tokens[places - back] == tokens[-1 - back]]
    return tokens[places + 1]
