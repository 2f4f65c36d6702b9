"""Changes to the logits before a token is chosen, in this order (transformers' order, where it has the step):

    1. logit bias            z[t] += bias[t]
    2. repetition            z[t] = z[t] / r if z[t] >= 0 else z[t] · r     for t in prompt or output
    3. presence, frequency   z[t] -= presence · [c(t) > 0] + frequency · c(t)     c(t): times t is in the output
    4. minimum of tokens     z[t] = -inf for end-of-sequence and stop ids while the output is too short

Sources: repetition: Keskar et al. 2019 (CTRL), as transformers' RepetitionPenaltyLogitsProcessor; presence and
frequency: as OpenAI's API and vLLM define them, over the output only.

Every step is a gather and a scatter of the few logits it changes, over all its rows at once. Rows without the
step are not touched, and cost nothing. `lists.py` says the same to a device that is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.server.decoding.interface import Processor, Row

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Entries = tuple[Ids, Floats]  # distinct token ids, a number for each


class LogitBias:
    """z[t] += bias[t]. Raises IndexError for ids outside the vocabulary: the frontend refuses them."""

    def __init__(self) -> None:
        self._bias: dict[int, Entries] = {}

    def applies(self, row: Row) -> bool:
        return bool(row.sampling.logit_bias)

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        parts = [self.entries(row) for row in rows]
        flat, at = _flat(logits, places, [ids for ids, _ in parts])
        flat[at] += _tensor(np.concatenate([bias for _, bias in parts]), logits)

    def release(self, key: int) -> None:
        self._bias.pop(key, None)

    def entries(self, row: Row) -> Entries:
        """The row's tokens with a bias, and the biases."""
        if row.key not in self._bias:
            bias = row.sampling.logit_bias
            self._bias[row.key] = np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)
        return self._bias[row.key]


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
        tables = [self.table(row) for row in rows]
        flat, at = _flat(logits, places, [table.token_ids for table in tables])
        counts = _tensor(np.concatenate([table.counts for table in tables]), logits)
        parameters = np.array([penalties(row) for row in rows], np.float32)
        lengths = [len(table.token_ids) for table in tables]
        repetition, presence, frequency = _tensor(np.repeat(parameters, lengths, axis=0).T, logits)
        scores = flat[at]
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        flat[at] = scores - (presence * (counts > 0) + frequency * counts)

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


class MinNewTokens:
    """z[t] = -inf for what would end the sequence before `min_new_tokens`; ignored end-of-sequence ids stay
    free."""

    def applies(self, row: Row) -> bool:
        return row.stopping.min_new_tokens > 0

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        short = [
            (place, ending(row, logits.shape[1]))
            for row, place in zip(rows, places, strict=True)
            if len(row.output_token_ids) < row.stopping.min_new_tokens
        ]
        if short:
            flat, at = _flat(logits, [place for place, _ in short], [ids for _, ids in short])
            flat[at] = -torch.inf

    def release(self, key: int) -> None:
        pass


class Processors:
    """All processors in their order; remembers which rows need which, so that a plain row costs one
    look-up."""

    def __init__(self, chain: Sequence[Processor] | None = None) -> None:
        self._chain: list[Processor] = list(chain) if chain is not None else [LogitBias(), Penalties(), MinNewTokens()]
        self._needs: dict[int, tuple[int, ...]] = {}  # row key -> indices into the chain

    def append(self, processor: Processor) -> None:
        """One more behind the others; before any row is seen."""
        self._chain.append(processor)

    def needs(self, row: Row) -> tuple[int, ...]:
        """Which processors the row uses; () when its logits stay as they are."""
        found = self._needs.get(row.key)
        if found is None:
            found = tuple(i for i, processor in enumerate(self._chain) if processor.applies(row))
            self._needs[row.key] = found
        return found

    def of(self, row: Row) -> Iterator[Processor]:
        """The processors that the row uses, in their order."""
        return (self._chain[i] for i in self.needs(row))

    def apply(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Change the logits of the rows that ask for it, in place.

        rows: R rows; logits: float32 [R, V], contiguous
        """
        members: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            for processor in self.needs(row):
                members.setdefault(processor, []).append(place)
        for processor in sorted(members):
            places = members[processor]
            self._chain[processor].apply([rows[place] for place in places], places, logits)

    def release(self, key: int) -> None:
        """The sequence has ended: forget its state."""
        if self._needs.pop(key, ()):
            for processor in self._chain:
                processor.release(key)


def penalties(row: Row) -> tuple[float, float, float]:
    """Repetition, presence, frequency."""
    sampling = row.sampling
    return sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty


def ending(row: Row, vocabulary: int) -> Ids:
    """The token ids inside the vocabulary that can end the sequence; possibly twice."""
    eos = () if row.stopping.ignore_eos else row.eos_token_ids
    return np.array([t for t in (*eos, *row.stopping.stop_token_ids) if t < vocabulary], np.int32)


def _flat(logits: Tensor, places: Sequence[int], token_ids: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """The logits as one vector [R·V], and the positions in it of each place's token ids, concatenated.

    Raises IndexError for a token id outside the vocabulary, which would fall into another row.
    """
    vocabulary = logits.shape[1]
    joined = np.concatenate(token_ids)
    check_inside(joined, vocabulary)
    offsets = np.repeat(np.array(places, np.int64) * vocabulary, [len(ids) for ids in token_ids])
    return logits.view(-1), torch.from_numpy(joined + offsets).to(logits.device)


def check_inside(token_ids: Ids, vocabulary: int) -> None:
    """Raise IndexError for a token id outside the vocabulary."""
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < vocabulary:
        raise IndexError(f"token ids from {token_ids.min()} to {token_ids.max()} in a vocabulary of {vocabulary}")


def _tensor(values: Floats, logits: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(logits.device)
