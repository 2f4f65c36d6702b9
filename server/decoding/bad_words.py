"""Bad words: sequences of tokens that must not be completed.

    z[t] = -inf  where  the text ends with w[:-1] and t = w[-1],  for each bad word w

As transformers' NoBadWordsLogitsProcessor; that one drops words that are an end-of-sequence token alone, which are
forbidden here like any other.
"""

from __future__ import annotations

import numpy as np

from lorry.server.decoding.scatter import Ids

Prefixes = dict[int, list[tuple[Ids, int]]]  # the token before the last → what comes before the last, the last


class BadWords:
    """The words of one row.

    single: int32 [S], the words of one token
    """

    def __init__(self, words: tuple[tuple[int, ...], ...]) -> None:
        self.single = np.array([word[0] for word in words if len(word) == 1], np.int32)
        self._prefixes: Prefixes = {}
        for word in words:
            if len(word) > 1:
                self._prefixes.setdefault(word[-2], []).append((np.array(word[:-1], np.int32), word[-1]))

    def forbidden(self, tokens: Ids) -> Ids:
        """What must not come next. tokens: int32 [L], the text so far."""
        begun = self._prefixes.get(int(tokens[-1]), ())
        last = [end for prefix, end in begun if np.array_equal(tokens[-len(prefix) :], prefix)]
        return np.concatenate((self.single, np.array(last, np.int32)))
