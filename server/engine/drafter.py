"""Which sequences get a draft in the next step, how long, and whether it pays."""

from __future__ import annotations

from lorry.server.decoding.speculation.pace import StepTimes
from lorry.server.decoding.speculation.strategy import Speculating
from lorry.server.engine.draft_model import DraftModel
from lorry.server.engine.plan import Plan
from lorry.server.engine.report import Report
from lorry.server.engine.scheduler import Scheduler
from lorry.server.engine.sequence import Sequence


class Drafter:
    """model: None: requests that ask for a draft model get no draft."""

    def __init__(self, scheduler: Scheduler, strategy: Speculating, model: DraftModel | None = None) -> None:
        self.model = model
        self._scheduler = scheduler
        self._strategy = strategy
        self._times = StepTimes()
        self._speculating = False  # anybody, at the last look

    def propose(self) -> dict[int, tuple[int, ...]]:
        """Drafts by the keys of their sequences; a draft model's have their length, and no content yet."""
        running = self._scheduler.running
        speculating = [sequence for sequence in running if sequence.request.message.sampling.speculates]
        self._speculating = bool(speculating)
        drafts: dict[int, tuple[int, ...]] = {}
        for sequence in speculating:
            if sequence.unread == 0 and sequence.row is not None and sequence.decides():
                drafts[sequence.key] = self._propose(sequence, len(running))
        return {key: draft for key, draft in drafts.items() if draft}

    def complete(self, plan: Plan) -> None:
        """Have the draft model write its drafts."""
        if self.model is not None:
            self.model.complete(plan)

    def saw(self, plan: Plan, seconds: float) -> None:
        """A step has taken so long, from its launch until its tokens were known."""
        if self._speculating and all(piece.stop - piece.start == piece.decided for piece in plan.pieces):
            self._times.saw(sum(piece.decided for piece in plan.pieces), seconds)

    def measure(self, report: Report) -> None:
        """What was proposed and accepted since the last time."""
        report.drafted += self._strategy.drafted
        report.accepted += self._strategy.accepted
        self._strategy.drafted.clear()
        self._strategy.accepted.clear()

    def _propose(self, sequence: Sequence, running: int) -> tuple[int, ...]:
        row, wanted = sequence.row, sequence.request.message.sampling.speculation
        assert row is not None and wanted is not None
        limit = self._scheduler.limits.context_length - sequence.length
        if wanted.proposer == "prompt_lookup":
            return tuple(self._strategy.look_up(row, self._strategy.room(row, self._times.share(running), limit)))
        if self.model is None:
            return ()
        share = self._times.share(running, self.model.seconds)
        return (0,) * self._strategy.room(row, share, min(limit, self.model.context_length - sequence.length))
