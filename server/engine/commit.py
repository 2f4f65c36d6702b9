"""From the logits of a step to tokens, forks, ends and the messages that tell of them."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, replace
from itertools import groupby

from lorry.server.decoding.interface import Continuation, Pending, Row, Strategy
from lorry.server.decoding.logprobs import token_logprobs
from lorry.server.engine.batch import Batch, Scored
from lorry.server.engine.messages import (
    EngineMessage,
    ErrorInfo,
    Failed,
    FinishReason,
    PromptLogprobs,
    Tokens,
)
from lorry.server.engine.output import Output
from lorry.server.engine.runner import Runner
from lorry.server.engine.scheduler import Scheduler
from lorry.server.engine.sequence import Request, Sequence, Status
from lorry.server.errors import LorryError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched. pending: its tokens under way; None: they are to be decided from `output`."""

    batch: Batch
    output: Output | None
    pending: Pending | None = None

    @property
    def waits(self) -> bool:
        """Whether the next step cannot be planned before this one is committed."""
        return self.pending is None and bool(self.batch.deciding or self.batch.scored)


class Committer:
    """Applies what the strategy decides; everything that leaves goes to `outbox`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        strategy: Strategy,
        eos_token_ids: tuple[int, ...],
        outbox: list[EngineMessage],
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.strategy = strategy
        self.eos_token_ids = eos_token_ids
        self.outbox = outbox

    def begin(self, batch: Batch, output: Output) -> Pending | None:
        """Choose the tokens of a step that was launched, on the device and without waiting for it.

        None: `commit` has to decide, since a row of the step forks or the strategy wants to see its logits.
        """
        sequences = [piece.sequence for piece in batch.deciding]
        if not sequences or batch.scored or not all(map(self._can_begin, sequences)):
            return None
        rows = [sequence.row for sequence in sequences if sequence.row is not None]
        pending = self.strategy.begin(rows, output.logits, [sequence.unread for sequence in sequences], output.last)
        self.runner.keep(pending.tokens)
        for place, sequence in enumerate(sequences):
            sequence.unread += 1
            sequence.place = place
        return pending

    def commit(self, flight: Flight, now: float) -> None:
        """A step has been computed, or is about to be: go on with each of its sequences, or end it."""
        for piece in flight.batch.pieces:
            self.scheduler.landed(piece)
        if flight.pending is not None:
            self._read(flight.batch, flight.pending, now)
        elif flight.output is not None:
            self._commit_waiting(flight.batch, flight.output, now)

    def _read(self, batch: Batch, pending: Pending, now: float) -> None:
        """The tokens that `begin` chose; those of sequences that have ended since are dropped."""
        continuations = pending.continuations()
        for piece in batch.deciding:
            piece.sequence.unread -= 1
        for continuation in continuations:
            sequence = batch.deciding[continuation.parent].sequence
            if sequence.status is not Status.FINISHED:
                self._born(sequence, now)
                self._extend(sequence, continuation, now)

    def _commit_waiting(self, batch: Batch, output: Output, now: float) -> None:
        for scored in batch.scored:
            self._score(scored, output)
        sequences: list[Sequence] = []
        sources: list[int] = []  # of each sequence, the row of logits
        for row, piece in enumerate(batch.deciding):
            if piece.sequence.status is Status.FINISHED:  # while the step ran
                continue
            born = self._born(piece.sequence, now)
            sequences += born
            sources += [row] * len(born)
        if not sequences:
            return
        continuations = self._decide(sequences, sources, output)
        for parent, group in groupby(continuations, key=lambda continuation: continuation.parent):
            self._continue(sequences[parent], list(group), now)
        for parent in set(range(len(sequences))) - {continuation.parent for continuation in continuations}:
            self._end(sequences[parent])

    # ---------------------------------------------------------------- ends that do not come from tokens

    def finish_request(self, request: Request, reason: FinishReason, now: float) -> None:
        """End all that is live of a request; what is there is the answer."""
        for sequence in request.live:
            self.finish_sequence(sequence, reason, now)

    def finish_sequence(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        """End one sequence, and with it those whose prompt it carries."""
        for index in sequence.request.pending or [sequence.index]:
            self._tell(sequence, index, reason, now)
        sequence.request.pending = []
        self._end(sequence)

    def abort(self, request: Request, index: int | None, now: float) -> None:
        """End a request, or one of its indices, with ABORTED."""
        if index is None:
            self.finish_request(request, FinishReason.ABORTED, now)
        elif index in request.pending and len(request.pending) > 1:
            request.pending.remove(index)
            self._tell(request.live[0], index, FinishReason.ABORTED, now)
        else:
            for sequence in request.live:
                if index in (request.pending or [sequence.index]):
                    self.finish_sequence(sequence, FinishReason.ABORTED, now)

    def fail(self, request: Request, error: LorryError) -> None:
        """End a request with an error."""
        for sequence in request.live:
            self._end(sequence)
        self.outbox.append(failed(request.id, error))

    def fault(self, request: Request) -> None:
        """End a request in whose step a bug showed itself; call it from an except block."""
        self.fail(request, internal_error(f"request {request.id}"))

    # ---------------------------------------------------------------- one step

    def _can_begin(self, sequence: Sequence) -> bool:
        """Whether the strategy can choose this sequence's token on the device; gives the first token its row."""
        request = sequence.request
        if len(request.pending) > 1 or request.message.stopping.max_new_tokens == 0:
            return False
        if request.pending:
            self._take_place(sequence)
        return sequence.row is not None and self.strategy.can_begin(sequence.row)

    def _take_place(self, sequence: Sequence) -> None:
        """The prompt is over: its sequence becomes the first of those that waited for it."""
        sequence.index, sequence.request.pending = sequence.request.pending[0], []
        sequence.row = self._row(sequence)

    def _score(self, scored: Scored, output: Output) -> None:
        """Log-probabilities of the prompt tokens whose logits this step has."""
        request = scored.request
        top = request.message.logprobs or 0
        rows = range(scored.row, scored.row + len(scored.targets))
        for part, logits in self.runner.logits(output, rows):
            targets = scored.targets[part.start : part.stop]
            request.prompt_logprobs += token_logprobs(logits, targets, [top] * len(targets))

    def _born(self, sequence: Sequence, now: float) -> list[Sequence]:
        """The sequences that go on from here: itself, and behind the prompt those that waited for it."""
        request = sequence.request
        if request.prefilled is None:
            request.prefilled = now
            if request.score_from is not None:
                self.outbox.append(PromptLogprobs(request.id, request.prompt_logprobs))
        if request.message.stopping.max_new_tokens == 0:
            self.finish_request(request, FinishReason.LENGTH, now)
            return []
        if not request.pending:
            return [sequence]
        others = request.pending[1:]
        self._take_place(sequence)
        return [sequence, *(self._fork(sequence, index) for index in others)]

    def _decide(self, sequences: list[Sequence], sources: list[int], output: Output) -> list[Continuation]:
        """Ask the strategy; when it fails, for each row alone, and end the requests of those that fail again."""
        rows = [sequence.row for sequence in sequences if sequence.row is not None]
        logits, hidden = output.logits, output.hidden
        if sources != list(range(logits.shape[0])):  # forks: several rows have the same logits
            logits = logits[sources]
        needs_hidden = self.strategy.needs_hidden_states
        try:
            return self.strategy.decide(rows, logits, hidden[sources] if needs_hidden else None)
        except LorryError as error:
            log.warning("%d rows cannot be decided together, trying them one by one: %s", len(rows), error)
        except Exception:
            log.exception("%d rows cannot be decided together, trying them one by one", len(rows))
        continuations: list[Continuation] = []
        for place, (row, source) in enumerate(zip(rows, sources, strict=True)):
            if sequences[place].status is Status.FINISHED:  # with another row of its request
                continue
            try:
                ((_, own),) = self.runner.logits(output, range(source, source + 1))
                decided = self.strategy.decide([row], own, hidden[source : source + 1])
            except LorryError as error:
                self.fail(sequences[place].request, error)
            except Exception:
                self.fault(sequences[place].request)
            else:
                continuations += [replace(continuation, parent=place) for continuation in decided]
        return continuations

    def _continue(self, sequence: Sequence, ways: list[Continuation], now: float) -> None:
        """The first way goes on in place, each other one on a fork."""
        if sequence.status is Status.FINISHED:
            return
        forks: list[Sequence] = []
        if len(ways) > 1:
            used = max(each.index for each in sequence.request.sequences)
            forks = [self._fork(sequence, used + number) for number in range(1, len(ways))]
        for each, way in zip([sequence, *forks], ways, strict=True):
            self._extend(each, way, now)

    def _extend(self, sequence: Sequence, way: Continuation, now: float) -> None:
        """Append the tokens up to the one that ends the sequence, and show what need not be held."""
        finish: FinishReason | None = None
        if way.final:
            del sequence.output[sequence.shown :], sequence.logprobs[:]
        for place, token_id in enumerate(way.token_ids):
            sequence.output.append(token_id)
            if way.logprobs is not None:
                sequence.logprobs.append(way.logprobs[place])
            if not way.held and not way.final and (finish := self._reason(sequence, token_id)) is not None:
                break
        if way.final:
            finish = self._reason(sequence, way.token_ids[-1]) or FinishReason.LENGTH
        shown = len(sequence.output) - way.held
        if shown > sequence.shown or finish is not None:
            self._tell(sequence, sequence.index, finish, now, shown)
        if finish is not None:
            self._end(sequence)

    def _reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Whether `token_id`, the last of the output, ends the sequence."""
        stopping, count = sequence.request.message.stopping, len(sequence.output)
        enough = count > stopping.min_new_tokens
        # where a grammar has ended nothing else is left, however short the output is
        ends = enough or sequence.request.message.sampling.structured_output is not None
        if ends and token_id in self.eos_token_ids and not stopping.ignore_eos:
            return FinishReason.EOS
        if enough and token_id in stopping.stop_token_ids:
            return FinishReason.STOP
        if count >= stopping.max_new_tokens or sequence.length >= self.scheduler.limits.context_length:
            return FinishReason.LENGTH
        return None

    def _tell(
        self, sequence: Sequence, index: int, finish: FinishReason | None, now: float, shown: int | None = None
    ) -> None:
        request, start = sequence.request, sequence.shown
        end = len(sequence.output) if shown is None else max(shown, start)
        logprobs = sequence.logprobs[: end - start] if request.message.logprobs is not None else None
        del sequence.logprobs[: end - start]
        sequence.shown = end
        timings = request.timings(now) if finish is not None else None
        self.outbox.append(Tokens(request.id, index, sequence.output[start:end], logprobs, finish, timings))

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = self.scheduler.fork(parent, index)
        child.row = self._row(child)
        self.strategy.forked(parent.key, child.key)
        return child

    def _row(self, sequence: Sequence) -> Row:
        request = sequence.request
        return Row(
            key=sequence.key,
            group=request.order,
            index=sequence.index,
            prompt_token_ids=request.prompt,
            output_token_ids=sequence.output,
            sampling=request.message.sampling,
            stopping=request.message.stopping,
            eos_token_ids=self.eos_token_ids,
            logprobs=request.message.logprobs,
        )

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is not Status.FINISHED:
            self.scheduler.finish(sequence)
            self.strategy.release(sequence.key)


def failed(request_id: str, error: LorryError) -> Failed:
    """The message that ends a request with `error`."""
    return Failed(request_id, ErrorInfo(error.kind, error.message, error.fields))


def internal_error(where: str) -> LorryError:
    """What a client may know of the exception that is being handled: an id that the log also bears."""
    fault_id = uuid.uuid4().hex[:12]
    log.exception("fault %s in %s", fault_id, where)
    return LorryError(f"internal error {fault_id}", fault_id=fault_id)
