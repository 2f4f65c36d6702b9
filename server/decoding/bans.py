"""Tokens that must not come next: z[t] = -inf, for the union of what forbids them.

    no-repeat-ngram, bad words, a minimum of tokens     then all but the allowed tokens

A sequence must go on: where these leave a row no token at all, its allowed tokens get z = 0, as transformers'
PrefixConstrainedLogitsProcessor has it; where no set of them is given, all tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.server.decoding import min_tokens, no_repeat_ngram
from lorry.server.decoding.allowed_tokens import restrict
from lorry.server.decoding.bad_words import BadWords
from lorry.server.decoding.history import Histories
from lorry.server.decoding.interface import Row
from lorry.server.decoding.scatter import Ids, flat


class Bans:
    """See above. Raises IndexError for ids outside the vocabulary: the frontend refuses them."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories
        self._words: dict[int, BadWords] = {}
        self._allowed: dict[int, Ids] = {}

    def applies(self, row: Row) -> bool:
        sampling = row.sampling
        return bool(
            sampling.no_repeat_ngram_size
            or sampling.bad_words
            or sampling.allowed_token_ids
            or row.stopping.min_new_tokens
        )

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        vocabulary = logits.shape[1]
        banned = [self._banned(row, vocabulary) for row in rows]
        if any(map(len, banned)):
            vector, at = flat(logits, places, banned)
            vector[at] = -torch.inf
        limited = [(place, self.allowed(row)) for row, place in zip(rows, places, strict=True)]
        limited = [(place, ids) for place, ids in limited if len(ids)]
        if limited:
            restrict(logits, [place for place, _ in limited], [ids for _, ids in limited])
        for row, place, ids in zip(rows, places, banned, strict=True):
            if self.leave_none(row, ids, vocabulary):
                logits[place, self.allowed_or_all(row, vocabulary)] = 0.0

    def release(self, key: int) -> None:
        self._histories.release(key)
        self._words.pop(key, None)
        self._allowed.pop(key, None)

    def fixed(self, row: Row) -> bool:
        """Whether what is forbidden does not depend on the text, but on its length."""
        return not row.sampling.no_repeat_ngram_size and all(len(word) == 1 for word in row.sampling.bad_words)

    def banned_at(self, row: Row, length: int, vocabulary: int) -> Ids:
        """What a row that is `fixed` must not hold, once its output has `length` tokens; possibly twice."""
        return np.concatenate((self._words_of(row).single, min_tokens.forbidden(row, length, vocabulary)))

    def allowed(self, row: Row) -> Ids:
        """The only tokens that the row may hold; none: any."""
        found = self._allowed.get(row.key)
        if found is None:
            found = self._allowed[row.key] = np.array(row.sampling.allowed_token_ids, np.int32)
        return found

    def allowed_or_all(self, row: Row, vocabulary: int) -> Ids:
        allowed = self.allowed(row)
        return allowed if len(allowed) else np.arange(vocabulary, dtype=np.int32)

    def leave_none(self, row: Row, banned: Ids, vocabulary: int) -> bool:
        """Whether a row from which `banned` is taken has no token left."""
        allowed = self.allowed(row)
        if len(banned) < (len(allowed) or vocabulary):
            return False
        return bool(np.isin(self.allowed_or_all(row, vocabulary), banned).all())

    def _banned(self, row: Row, vocabulary: int) -> Ids:
        length, sampling = len(row.output_token_ids), row.sampling
        if self.fixed(row):
            return self.banned_at(row, length, vocabulary)
        tokens = self._histories.of(row)
        parts = [min_tokens.forbidden(row, length, vocabulary)]
        if sampling.no_repeat_ngram_size:
            parts.append(no_repeat_ngram.forbidden(tokens, sampling.no_repeat_ngram_size))
        if sampling.bad_words:
            parts.append(self._words_of(row).forbidden(tokens))
        return np.concatenate(parts)

    def _words_of(self, row: Row) -> BadWords:
        words = self._words.get(row.key)
        if words is None:
            words = self._words[row.key] = BadWords(row.sampling.bad_words)
        return words
