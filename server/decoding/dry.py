"""DRY, "don't repeat yourself": a penalty on tokens that would lengthen a repetition.

    n(t) = the longest run of tokens that ends the text and stands before an earlier t, too
    z[t] -= multiplier · base^(n(t) - allowed_length)        where n(t) >= allowed_length

Runs do not reach over a sequence breaker, nor before the newest `range` tokens, and count as 50 from 50 on; a breaker
is never penalized. Source: the definition by p-e-w in text-generation-webui (pull request 5677), breakers as token ids
like there; llama.cpp has the same formula. transformers has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lorry.server.decoding.history import Histories
from lorry.server.decoding.interface import Row
from lorry.server.decoding.scatter import NO_IDS, Entries, Ids, flat, tensor
from lorry.server.params import Dry

LONGEST = 50  # tokens of a run: keeps base^n finite, and the search short


class DryPenalty:
    """Every step looks at the whole text again: some microseconds a thousand tokens, no state to go wrong."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories

    def applies(self, row: Row) -> bool:
        return row.sampling.dry is not None

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        parts = [penalized(self._histories.of(row), row.sampling.dry) for row in rows if row.sampling.dry is not None]
        if any(len(ids) for ids, _ in parts):
            vector, at = flat(logits, places, [ids for ids, _ in parts])
            vector[at] -= tensor(np.concatenate([values for _, values in parts]), logits)

    def release(self, key: int) -> None:
        self._histories.release(key)


def penalized(tokens: Ids, dry: Dry) -> Entries:
    """Which tokens are penalized, and by how much. tokens: int32 [L], the text so far."""
    nothing = NO_IDS, np.empty(0, np.float32)
    tokens = tokens[-dry.range :] if dry.range else tokens
    run = _unbroken(tokens[-LONGEST:].tolist(), dry.sequence_breakers)
    if run < dry.allowed_length:
        return nothing
    places = np.flatnonzero(tokens[:-1] == tokens[-1])  # where runs end, before the end of the text
    longest: dict[int, int] = {}  # by what follows the run
    for length in range(1, run + 1):
        if not places.size:
            break
        if length >= dry.allowed_length:
            longest |= dict.fromkeys(tokens[places + 1].tolist(), length)
        places = places[places >= length]
        if length < run:
            places = places[tokens[places - length] == tokens[-1 - length]]
    for breaker in dry.sequence_breakers:
        longest.pop(breaker, None)
    if not longest:
        return nothing
    exponents = np.array(list(longest.values()), np.float64) - dry.allowed_length
    return np.array(list(longest), np.int32), (dry.multiplier * dry.base**exponents).astype(np.float32)


def _unbroken(tokens: list[int], breakers: tuple[int, ...]) -> int:
    """How many tokens at the end hold no breaker."""
    if not any(breaker in tokens for breaker in breakers):  # a search in C each: most texts end here
        return len(tokens)
    return next(back for back, token in enumerate(reversed(tokens)) if token in breakers)
