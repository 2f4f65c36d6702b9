"""The tokens of each sequence, prompt and output, as an array that grows with it."""

from __future__ import annotations

import numpy as np

from lorry.server.decoding.interface import Row
from lorry.server.decoding.scatter import Ids


class Histories:
    """By the rows' keys. What follows from the tokens alone needs no more state than these."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[Ids, int]] = {}  # room for more, how many there are

    def of(self, row: Row) -> Ids:
        """int32 [L], all tokens of the row so far; valid until the next call."""
        length = len(row.prompt_token_ids) + len(row.output_token_ids)
        tokens, known = self._tokens.get(row.key, (np.empty(0, np.int32), 0))
        if length > len(tokens):
            tokens = np.resize(tokens, length + max(64, length // 2)) if known else self._begun(row, length)
        first = known - len(row.prompt_token_ids)
        if known and known < length:
            tokens[known:length] = row.output_token_ids[first:]
        self._tokens[row.key] = (tokens, length)
        return tokens[:length]

    def release(self, key: int) -> None:
        self._tokens.pop(key, None)

    @staticmethod
    def _begun(row: Row, length: int) -> Ids:
        tokens = np.zeros(length + max(64, length // 2), np.int32)
        prompt = len(row.prompt_token_ids)
        tokens[:prompt] = row.prompt_token_ids
        tokens[prompt:length] = row.output_token_ids
        return tokens
