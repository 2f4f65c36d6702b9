"""What the processors do to the logits of a batch, as lists of tokens that travel to the device with the parameters.

    z[t] = -inf                but for the allowed tokens, in rows that have such a set; 0 for all of these, and no more
                               where a row would be left none
    z[t] += added[t]           bias, and -inf for bad words of one token and what must not end the sequence yet
    penalties on t             for each distinct token t of prompt and output, with its count in the output

The host's tables hold all tokens but the one that a step ahead of the host leaves unread; `penalize` counts that one in
on the device. So lists follow from the row's tokens alone, and nothing of them stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorry.server.decoding.bans import Bans
from lorry.server.decoding.interface import Row
from lorry.server.decoding.logit_bias import LogitBias
from lorry.server.decoding.penalties import OFF, Penalties, penalties
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.scatter import NO_IDS, NOTHING, Entries, Floats, Ids, check_inside, ragged


@dataclass(frozen=True, slots=True)
class TokenLists:
    """As `lorry.kernels.sampling.penalize` takes them, for R rows.

    added, counted: starts int32 [R + 1], token ids int32 [E], numbers float32 [E]
    penalties: float32 [3, R], repetition, presence, frequency; off in rows that ask for none
    counting: bool [R], rows with penalties that have an unread token
    limited: int64 [A], rows with a set of allowed tokens; allowed: int64 [E], these, as places in all logits in a
        row; zeroed: bool [E], those that get 0
    """

    added: tuple[NDArray[np.int32], Ids, Floats]
    counted: tuple[NDArray[np.int32], Ids, Floats]
    penalties: Floats
    counting: NDArray[np.bool_]
    limited: NDArray[np.int64]
    allowed: NDArray[np.int64]
    zeroed: NDArray[np.bool_]

    def arrays(self) -> list[NDArray[Any]]:
        """The fields in their order, tuples and rows one by one."""
        return [*self.added, *self.counted, *self.penalties, self.counting, self.limited, self.allowed, self.zeroed]


def listed(processors: Processors, row: Row) -> bool:
    """Whether lists can say all that a row's processors do; constant for the life of the row."""
    return all(
        isinstance(processor, LogitBias | Penalties) or (isinstance(processor, Bans) and processor.fixed(row))
        for processor in processors.of(row)
    )


def token_lists(
    processors: Processors, rows: Sequence[Row], unread: Sequence[int], vocabulary: int
) -> TokenLists | None:
    """What the processors would do once the output of each row has grown by its unread token, if it has one.

    rows: R `listed` rows; unread: 0 or 1 each
    Returns None when no row needs anything. Raises IndexError for a token id outside the vocabulary.
    """
    if not any(processors.needs(row) for row in rows):
        return None
    added, counted = [NOTHING] * len(rows), [NOTHING] * len(rows)
    parameters = np.tile(OFF, (1, len(rows)))
    counting = np.zeros(len(rows), np.bool_)
    allowed, zeroed = [NO_IDS] * len(rows), np.zeros(len(rows), np.bool_)
    for place, (row, more) in enumerate(zip(rows, unread, strict=True)):
        for processor in processors.of(row):
            if isinstance(processor, LogitBias):
                added[place] = processor.entries(row)
            elif isinstance(processor, Penalties):
                table = processor.table(row)
                counted[place] = table.token_ids, table.counts
                parameters[:, place] = penalties(row)
                counting[place] = more > 0
            elif isinstance(processor, Bans):
                allowed[place] = processor.allowed(row)
                banned = processor.banned_at(row, len(row.output_token_ids) + more, vocabulary)
                if processor.leave_none(row, banned, vocabulary):
                    allowed[place], zeroed[place] = processor.allowed_or_all(row, vocabulary), True
                    added[place], counted[place], counting[place] = NOTHING, NOTHING, False
                elif len(banned):
                    added[place] = _forbidding(added[place], banned)
    limited = np.flatnonzero([len(ids) > 0 for ids in allowed])
    return TokenLists(
        ragged(added, vocabulary),
        ragged(counted, vocabulary),
        parameters,
        counting,
        limited,
        _places(limited, [allowed[place] for place in limited], vocabulary),
        np.repeat(zeroed, [len(ids) for ids in allowed]),
    )


def _forbidding(added: Entries, token_ids: Ids) -> Entries:
    """`added`, but -inf for `token_ids`."""
    ids, values = added
    others = ~np.isin(ids, token_ids)
    forbidden = np.unique(token_ids)
    infinite = np.full(len(forbidden), -np.inf, np.float32)
    return np.concatenate((ids[others], forbidden)), np.concatenate((values[others], infinite))


def _places(rows: NDArray[np.int64], token_ids: Sequence[Ids], vocabulary: int) -> NDArray[np.int64]:
    joined = np.concatenate((NO_IDS, *token_ids))
    check_inside(joined, vocabulary)
    return np.repeat(rows * vocabulary, [len(ids) for ids in token_ids]) + joined
