"""Few logits of many rows at once: a gather and a scatter over the logits as one vector, or a list for each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Entries = tuple[Ids, Floats]  # distinct token ids, a number for each

NO_IDS: Ids = np.empty(0, np.int32)
NOTHING: Entries = (NO_IDS, np.empty(0, np.float32))


def flat(logits: Tensor, places: Sequence[int], token_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """The logits as one vector [R·V], and the positions in it of each place's token ids, concatenated.

    Raises IndexError for a token id outside the vocabulary, which would fall into another row.
    """
    vocabulary = logits.shape[1]
    joined = np.concatenate(token_ids)
    check_inside(joined, vocabulary)
    offsets = np.repeat(np.array(places, np.int64) * vocabulary, [len(ids) for ids in token_ids])
    return logits.view(-1), torch.from_numpy(joined + offsets).to(logits.device)


def ragged(rows: Sequence[Entries], vocabulary: int) -> tuple[Ids, Ids, Floats]:
    """The rows' entries one behind the other: starts int32 [R + 1], token ids int32 [E], numbers float32 [E].

    Raises IndexError for a token id outside the vocabulary.
    """
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(ids) for ids, _ in rows], out=starts[1:])
    token_ids = np.concatenate([ids for ids, _ in rows])
    check_inside(token_ids, vocabulary)
    return starts, token_ids, np.concatenate([values for _, values in rows])


def check_inside(token_ids: Ids, vocabulary: int) -> None:
    """Raise IndexError for a token id outside the vocabulary."""
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < vocabulary:
        raise IndexError(f"token ids from {token_ids.min()} to {token_ids.max()} in a vocabulary of {vocabulary}")


def tensor(values: Floats, logits: Tensor) -> Tensor:
    """The numbers where the logits are."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(logits.device)
