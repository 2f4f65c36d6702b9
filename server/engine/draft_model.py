"""A small model that proposes tokens for a large one.

Its keys and values lie in a cache of its own under the blocks of the sequences, whose tables serve both models: what is
shared, forked or freed is so in both. `Sequence.drafted` says how many tokens of a sequence its cache holds; the first
proposal after a while catches up with the rest. It knows no adapter. Nothing that it does changes a token, so what goes
wrong here costs a draft and no more.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from lorry.server.decoding.speculation.strategy import Speculating
from lorry.server.engine.batch import build_batch
from lorry.server.engine.plan import Piece, Plan
from lorry.server.engine.runner import Runner

log = logging.getLogger(__name__)

FADING = 0.9  # of the time of a token, with each
FEW = 2  # tokens that a row catches up with after a draft that was right throughout; they count as one


class DraftModel:
    """runner: of the draft model; token_budget: the most tokens that it catches up with in a step."""

    def __init__(self, runner: Runner, strategy: Speculating, token_budget: int) -> None:
        self.runner = runner
        self.context_length = runner.decoder.config.context_length
        self.seconds = 0.0  # of one token for all rows
        self._strategy = strategy
        self._budget = token_budget

    def complete(self, plan: Plan) -> None:
        """Replace the drafts of its rows by what the model proposes; a row that ends, or that it has to catch up with,
        gets a shorter one or none."""
        self.runner.kv.copy_blocks(plan.copies)
        places = [place for place, piece in enumerate(plan.pieces) if piece.draft and _proposes(piece)]
        if not places:
            return
        drafts: dict[int, list[int]] = {place: [] for place in places}
        try:
            self._propose(plan.pieces, drafts)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("the draft model failed")
            drafts = {place: [] for place in places}
        for place, draft in drafts.items():
            plan.pieces[place] = replace(plan.pieces[place], draft=tuple(draft))

    def _propose(self, pieces: list[Piece], drafts: dict[int, list[int]]) -> None:
        going = self._catch_up(pieces, drafts)
        while going := [place for place in going if len(drafts[place]) < len(pieces[place].draft)]:
            run = [_newest(pieces[place], drafts[place]) for place in going]
            going = self._next(run, going, drafts)

    def _catch_up(self, pieces: list[Piece], drafts: dict[int, list[int]]) -> list[int]:
        """Run what the model has not seen of each row, and propose a token; the places of the rows that have one."""
        left, behind, done = self._budget, list[Piece](), list[int]()
        for place in drafts:
            sequence = pieces[place].sequence
            end = min(pieces[place].end, sequence.drafted + left)
            if end <= sequence.drafted:
                continue
            behind.append(Piece(sequence, sequence.drafted, end))
            left -= end - sequence.drafted
            if end == pieces[place].end:
                done.append(place)
        return self._next(behind, done, drafts) if behind else []

    def _next(self, run: list[Piece], places: list[int], drafts: dict[int, list[int]]) -> list[int]:
        """Run some pieces, and propose a token for the rows at `places`, which are those that decide; the places where
        that does not end the draft."""
        begun = time.perf_counter()
        batch = build_batch(run, [], lambda runs: None)
        output = self.runner.forward(batch)
        for piece in run:
            piece.sequence.drafted = piece.stop
        if not places:
            return []
        rows = [row for piece in batch.deciding if (row := piece.sequence.row) is not None]
        tokens = self._strategy.propose(rows, [drafts[place] for place in places], output.logits)
        if max(piece.stop - piece.start for piece in run) <= FEW:
            seconds = time.perf_counter() - begun
            self.seconds = FADING * (self.seconds or seconds) + (1 - FADING) * seconds
        going = []
        for place, token in zip(places, tokens, strict=True):
            if token is not None:
                drafts[place].append(token)
                going.append(place)
        return going


def _newest(piece: Piece, draft: list[int]) -> Piece:
    """The last token of the draft alone."""
    return replace(piece, start=piece.end + len(draft) - 1, draft=tuple(draft))


def _proposes(piece: Piece) -> bool:
    wanted = piece.sequence.request.message.sampling.speculation
    return wanted is not None and wanted.proposer == "draft_model"
