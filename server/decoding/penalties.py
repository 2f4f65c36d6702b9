"""Penalties on tokens that the text holds already: repetition, then presence and frequency.

    z[t] = z[t] / r if z[t] >= 0 else z[t] · r                 for t in prompt or output
    z[t] -= presence · [c(t) > 0] + frequency · c(t)           c(t): times t is in the output

Sources: repetition: Keskar et al. 2019 (arXiv:1909.05858), as transformers' RepetitionPenaltyLogitsProcessor; presence
and frequency: as OpenAI's API and vLLM define them, over the output only. transformers has none of these two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.kernels import dispatch
from lorry.kernels.sampling import TokenValues, penalize
from lorry.kernels.transfer import to_device
from lorry.server.decoding.interface import Row
from lorry.server.decoding.scatter import NOTHING, Entries, Floats, Ids, ragged

OFF = np.array([[1.0], [0.0], [0.0]], np.float32)  # repetition, presence, frequency


class Penalties:
    """Repetition, then presence and frequency, from one table of the tokens that each sequence holds."""

    def __init__(self) -> None:
        self._tables: dict[int, TokenTable] = {}

    def applies(self, row: Row) -> bool:
        sampling = row.sampling
        return (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        counted: list[Entries] = [NOTHING] * len(logits)
        parameters = np.tile(OFF, (1, len(logits)))
        for row, place in zip(rows, places, strict=True):
            table = self.table(row)
            counted[place] = table.token_ids, table.counts
            parameters[:, place] = penalties(row)
        lists = ragged(counted, logits.shape[1])
        if dispatch.on_gpu(logits):  # a kernel compiled for `on_device.begin`: with every argument, all aligned
            none, last = ragged([NOTHING] * len(logits), logits.shape[1]), np.full(len(logits), -1, np.int64)
            sent = to_device([*none, *lists, *parameters, last], logits.device)
            penalize(logits, TokenValues(*sent[:3]), TokenValues(*sent[3:6]), *sent[6:])
        else:
            penalize(logits, None, TokenValues(*map(torch.from_numpy, lists)), *torch.from_numpy(parameters))

    def release(self, key: int) -> None:
        self._tables.pop(key, None)

    def table(self, row: Row) -> TokenTable:
        """The row's tokens so far."""
        table = self._tables.get(row.key)
        if table is None:
            table = self._tables[row.key] = TokenTable(row.prompt_token_ids)
        table.update(row.output_token_ids)
        return table


class TokenTable:
    """The distinct tokens of one sequence, in order of appearance, and how often its output holds each."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._place = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._token_ids = np.fromiter(self._place, np.int32, len(self._place))
        self._counts = np.zeros(len(self._place), np.float32)
        self._seen = 0

    @property
    def token_ids(self) -> Ids:
        """int32 [U]"""
        return self._token_ids[: len(self._place)]

    @property
    def counts(self) -> Floats:
        """float32 [U], 0 for tokens that only the prompt holds"""
        return self._counts[: len(self._place)]

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Count the tokens that were appended since the last call."""
        for token_id in output_token_ids[self._seen :]:
            place = self._place.setdefault(token_id, len(self._place))
            if place == len(self._token_ids):
                self._grow()
            self._token_ids[place] = token_id
            self._counts[place] += 1
        self._seen = len(output_token_ids)

    def _grow(self) -> None:
        spare = max(16, len(self._token_ids))
        self._token_ids = np.concatenate((self._token_ids, np.zeros(spare, np.int32)))
        self._counts = np.concatenate((self._counts, np.zeros(spare, np.float32)))


def penalties(row: Row) -> tuple[float, float, float]:
    """Repetition, presence, frequency."""
    sampling = row.sampling
    return sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
