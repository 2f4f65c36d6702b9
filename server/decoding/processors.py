"""Changes to the logits before a token is chosen, in this order (transformers' order, where it has the step):

    1. logit bias              `logit_bias.py`
    2. repetition              `penalties.py`
    3. presence, frequency     `penalties.py`
    4. DRY                     `dry.py`
    5. no-repeat-ngram         `no_repeat_ngram.py`
    6. bad words               `bad_words.py`
    7. minimum of tokens       `min_tokens.py`
    8. allowed tokens          `allowed_tokens.py`

transformers has no 3 and 4: presence and frequency stand where vLLM has them, behind repetition, and DRY behind all
penalties, as in llama.cpp and text-generation-webui. 5 to 8 forbid tokens, in one step (`bans.py`). What cuts the
distribution comes behind all of them (`truncation.py`).

Every step changes few logits, those of all its rows at once. Rows without the step are not touched, and cost nothing.
`lists.py` says the same to a device that is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lorry.server.decoding.bans import Bans
from lorry.server.decoding.dry import DryPenalty
from lorry.server.decoding.history import Histories
from lorry.server.decoding.interface import Processor, Row
from lorry.server.decoding.logit_bias import LogitBias
from lorry.server.decoding.penalties import Penalties


def default_chain() -> list[Processor]:
    """Every processor, in order."""
    histories = Histories()
    return [LogitBias(), Penalties(), DryPenalty(histories), Bans(histories)]


class Processors:
    """All processors in their order; remembers which rows need which, so that a plain row costs one
    look-up."""

    def __init__(self, chain: Sequence[Processor] | None = None) -> None:
        self._chain: list[Processor] = default_chain() if chain is None else list(chain)
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
