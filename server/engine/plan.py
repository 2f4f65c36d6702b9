"""What a step is to do: which tokens of which sequences, in which order."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorry.server.cache.block_table import Copy
from lorry.server.cache.blocks import BLOCK_SIZE
from lorry.server.engine.sequence import Request, Sequence
from lorry.server.errors import LorryError


@dataclass(frozen=True, slots=True)
class Piece:
    """Run tokens [start, end) of a sequence, and a draft behind them, whose blocks are there.

    A draft model runs only the draft's last token: it begins behind the end.
    """

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """The end of what is run, the draft included."""
        return self.end + len(self.draft)

    @property
    def decided(self) -> int:
        """Rows of logits that are decided on, those of its last tokens; for a piece at the end of its sequence."""
        return min(self.stop - self.start, 1 + len(self.draft))

    def tokens(self) -> list[int]:
        """Ids of what is run, without an unread token."""
        return [*self.sequence.tokens(self.start, self.end), *self.draft[max(0, self.start - self.end) :]]


@dataclass(slots=True)
class Plan:
    """One step. Pieces whose last tokens have equal combos are adjacent, and of these, those of one request."""

    pieces: list[Piece] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)  # blocks to copy before the step writes
    started: list[Request] = field(default_factory=list)  # run in this step for the first time
    failed: list[tuple[Request, LorryError]] = field(default_factory=list)  # ended, never to run

    def sort(self) -> None:
        self.pieces.sort(key=_row_order)

    def parts(self) -> list[list[Piece]]:
        """The pieces as they can be run apart: each alone, but those of a search together that are decided together."""
        parts: dict[object, list[Piece]] = {}
        for piece in self.pieces:
            request = piece.sequence.request
            together = request.search is not None and piece.end == piece.sequence.length
            parts.setdefault(request.id if together else piece, []).append(piece)
        return list(parts.values())


def _row_order(piece: Piece) -> tuple[tuple[tuple[int, float], ...], int, int]:
    sequence = piece.sequence
    combo = sequence.combo if piece.end > sequence.namespace.start else ()
    return combo, sequence.request.order, sequence.index


def first_share(remaining: int, left: int) -> int:
    """Tokens that a prompt with `remaining` tokens takes of the `left` ones, when others may follow it.

    A prompt that ends in this step takes all it needs; a longer one leaves half to those behind it.
    """
    return remaining if remaining <= left else max(left // 2, min(left, BLOCK_SIZE))
