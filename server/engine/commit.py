"""From the logits of a step to tokens, forks, ends and the messages that tell of them."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from lorry.server.decoding.dola import contrasted
from lorry.server.decoding.interface import Continuation, Pending, Row, Strategy
from lorry.server.decoding.logprobs import token_logprobs
from lorry.server.engine.batch import Batch, Observed, Scored, Tapped
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
        return self.pending is None and bool(self.batch.deciding or self.batch.scored or self.batch.observed)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a sequence's logits are, and the draft that they are of, or the layers that they are contrasted with."""

    rows: range
    draft: tuple[int, ...]
    tapped: Tapped | None = None


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
        if not sequences or batch.scored or batch.observed or batch.decided > len(sequences):
            return None
        if not all(map(self._can_begin, sequences)):
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
        for observed in batch.observed:
            self._observe(observed, output)
        sequences: list[Sequence] = []
        sources: list[Source] = []  # of each sequence
        first = 0
        tapped = {each.row: each for each in batch.tapped}
        for piece in batch.deciding:
            source = Source(range(first, first + piece.decided), piece.draft, tapped.get(first))
            first += piece.decided
            if piece.sequence.status is Status.FINISHED:  # while the step ran
                continue
            born = self._born(piece.sequence, now)
            sequences += born
            sources += [source] * len(born)
        if not sequences:
            return
        continuations = self._decide(sequences, sources, output)
        for parent, group in groupby(continuations, key=lambda continuation: continuation.parent):
            self._continue(sequences[parent], list(group), now)
        for parent in set(range(len(sequences))) - {continuation.parent for continuation in continuations}:
            self._drop(sequences[parent], now)

    # ---------------------------------------------------------------- ends that do not come from tokens

    def finish_request(self, request: Request, reason: FinishReason, now: float) -> None:
        """End all that is live of a request; what is there is the answer."""
        live = request.live
        if request.search is not None and reason is FinishReason.TIME_LIMIT:
            rows = [sequence.row for sequence in live if sequence.row is not None]
            for way in self.strategy.conclude(rows) if rows else []:
                self._answer(live[way.parent], way, now, reason)
        for sequence in live:
            self.finish_sequence(sequence, reason, now)

    def finish_sequence(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        """End one sequence, and with it those whose prompt it carries; what it holds back is not shown."""
        request = sequence.request
        for index in request.pending or ([] if request.search is not None else [sequence.index]):
            self._tell(sequence, index, reason, now, sequence.shown)
        request.pending = []
        self._end(sequence)

    def abort(self, request: Request, index: int | None, now: float) -> None:
        """End a request, or one of its indices, with ABORTED."""
        if index is None or request.pending == [index]:
            self.finish_request(request, FinishReason.ABORTED, now)
        elif index in request.pending:
            request.pending.remove(index)
            self._tell(request.live[0], index, FinishReason.ABORTED, now, request.live[0].shown)
        elif request.search is None:
            for sequence in request.live:
                if index == sequence.index and not request.pending:
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
        if request.search is not None or len(request.pending) > 1 or request.message.stopping.max_new_tokens == 0:
            return False
        if request.dola is not None:
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
            entropies = [request.message.entropy] * len(targets)
            request.prompt_logprobs += token_logprobs(logits, targets, [top] * len(targets), entropies)

    def _observe(self, observed: Observed, output: Output) -> None:
        """Show the strategy the hidden states of a prompt."""
        sequence, request = observed.sequence, observed.sequence.request
        if sequence.status is Status.FINISHED or request.observed is None:
            return
        self.strategy.observe(sequence.key, output.hidden[observed.row : observed.row + observed.count])
        request.observed += observed.count

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
        if request.search is not None and sequence.row is None:
            sequence.row = self._row(sequence)
        if request.search is not None or not request.pending:
            return [sequence]
        others = request.pending[1:]
        self._take_place(sequence)
        return [sequence, *(self._fork(sequence, index) for index in others)]

    def _decide(self, sequences: list[Sequence], sources: list[Source], output: Output) -> list[Continuation]:
        """Ask the strategy; when it fails, for each row or search alone, without drafts, and end the requests that fail
        again."""
        rows = [_with_draft(sequence.row, source) for sequence, source in zip(sequences, sources, strict=True)]
        logits, hidden = output.logits, output.hidden
        places = [place for source in sources for place in source.rows]
        try:
            for tapped in {source.tapped for source in sources if source.tapped is not None}:
                self._contrast(logits[tapped.row], tapped, output)
            if places != list(range(logits.shape[0])):  # forks: several rows have the same logits
                logits = logits[places]
            return self.strategy.decide(rows, logits, hidden[places] if any(map(observes, rows)) else None)
        except LorryError as error:
            log.warning("%d rows cannot be decided together, trying them one by one: %s", len(rows), error)
        except Exception:
            log.exception("%d rows cannot be decided together, trying them one by one", len(rows))
        continuations: list[Continuation] = []
        together: dict[tuple[bool, int], list[int]] = {}
        for place, row in enumerate(rows):
            together.setdefault(_decided_with(row), []).append(place)
        for places in together.values():
            if sequences[places[0]].status is Status.FINISHED:  # with another row of its request
                continue
            firsts = [sources[place].rows.start for place in places]
            alone = [replace(rows[place], draft_token_ids=()) for place in places]
            try:
                own = torch.cat([self._logits(sources[place], output) for place in places])
                decided = self.strategy.decide(alone, own, hidden[firsts])
            except LorryError as error:
                self.fail(sequences[places[0]].request, error)
            except Exception:
                self.fault(sequences[places[0]].request)
            else:
                accepted = 0 if sources[places[0]].draft else None
                continuations += [replace(way, parent=places[way.parent], accepted=accepted) for way in decided]
        return sorted(continuations, key=lambda way: way.parent)

    def _logits(self, source: Source, output: Output) -> Tensor:
        """float32 [1, V], made again: those of the first row of a sequence."""
        first = source.rows.start
        ((_, logits),) = self.runner.logits(output, range(first, first + 1))
        if source.tapped is not None:
            self._contrast(logits[0], source.tapped, output)
        return logits

    @torch.inference_mode()
    def _contrast(self, logits: Tensor, tapped: Tapped, output: Output) -> None:
        """logits: float32 [V], the model's own; changed in place."""
        logits.copy_(contrasted(logits, self.runner.early_logits(output, tapped.place, tapped.taps)))

    def _continue(self, sequence: Sequence, ways: list[Continuation], now: float) -> None:
        """Finals are answers. Of the others the first goes on in place, each other one on a fork."""
        if sequence.status is Status.FINISHED:
            return
        for way in ways:
            if way.final:
                self._answer(sequence, way, now)
        ways = [way for way in ways if not way.final]
        if not ways:
            self._drop(sequence, now)
            return
        forks: list[Sequence] = []
        if len(ways) > 1:
            shown = len(sequence.output) + min(len(way.token_ids) - way.held for way in ways)
            if self._show(sequence, min(shown, len(sequence.output)), now):  # by all of them, so once
                return
            used = max(each.index for each in sequence.request.sequences)
            forks = [self._fork(sequence, used + number) for number in range(1, len(ways))]
        for each, way in zip([sequence, *forks], ways, strict=True):
            self._extend(each, way, now)

    def _extend(self, sequence: Sequence, way: Continuation, now: float) -> None:
        """Append the tokens, and show what need not be held."""
        sequence.output += way.token_ids
        if way.logprobs is not None:
            sequence.logprobs += way.logprobs
        if not self._show(sequence, len(sequence.output) - way.held, now) and way.accepted is not None:
            self.scheduler.accepted(sequence, way.accepted)

    def _show(self, sequence: Sequence, end: int, now: float) -> bool:
        """Show the output before `end`; the first token of it that ends the sequence is the last. Whether one did. A
        shadow shows nothing, and ends with what it guides."""
        if sequence.shadowy:
            return False
        finish: FinishReason | None = None
        for place in range(sequence.shown, end):
            if (finish := self._reason(sequence.request, sequence.output[place], place + 1)) is not None:
                end = place + 1
                del sequence.output[end:]
                break
        if end > sequence.shown:
            self._tell(sequence, sequence.answer, finish, now, end)
        if finish is not None:
            self._finished(sequence)
        return finish is not None

    def _answer(
        self, sequence: Sequence, way: Continuation, now: float, otherwise: FinishReason = FinishReason.LENGTH
    ) -> None:
        """Tell a final output, of a search under the least index that has no answer yet; if any is left, it goes on."""
        request = sequence.request
        if request.search is not None and not request.pending:
            return
        index = sequence.index if request.search is None else request.pending.pop(0)
        count = sequence.shown + len(way.token_ids)
        finish = self._reason(request, way.token_ids[-1], count)
        if finish is None or finish is FinishReason.LENGTH:
            finish = otherwise
        logprobs = list(way.logprobs or ()) if request.message.logprobs is not None else None
        tokens = list(way.token_ids)
        self.outbox.append(Tokens(request.id, index, tokens, logprobs, finish, request.timings(now), way.score))

    def _drop(self, sequence: Sequence, now: float) -> None:
        """End a sequence that has no continuation; with the last one of a search what lacks an answer has none."""
        request = sequence.request
        if sequence.status is Status.FINISHED:
            return
        if request.search is not None and request.pending and len(request.live) == 1:
            self.finish_sequence(sequence, FinishReason.LENGTH, now)
        else:
            self._end(sequence)

    def _finished(self, sequence: Sequence) -> None:
        """A token has ended the sequence, and the search that it is of."""
        request = sequence.request
        if request.search is not None:
            request.pending = []
        for each in list(sequence.unit):
            self._end(each)

    def _reason(self, request: Request, token_id: int, count: int) -> FinishReason | None:
        """Whether `token_id`, the `count`-th of an output, ends its sequence."""
        stopping = request.message.stopping
        enough = count > stopping.min_new_tokens
        # where a grammar has ended nothing else is left, however short the output is
        ends = enough or request.message.sampling.structured_output is not None
        if ends and token_id in self.eos_token_ids and not stopping.ignore_eos:
            return FinishReason.EOS
        if enough and token_id in stopping.stop_token_ids:
            return FinishReason.STOP
        if count >= stopping.max_new_tokens or len(request.prompt) + count >= self.scheduler.limits.context_length:
            return FinishReason.LENGTH
        return None

    def _tell(self, sequence: Sequence, index: int, finish: FinishReason | None, now: float, end: int) -> None:
        """Send the output before `end` that was not sent yet."""
        request, start = sequence.request, sequence.shown
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
            prompt_token_ids=sequence.prompt,
            output_token_ids=sequence.output,
            sampling=request.message.sampling,
            stopping=request.message.stopping,
            eos_token_ids=self.eos_token_ids,
            logprobs=request.message.logprobs,
            entropy=request.message.entropy,
        )

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is not Status.FINISHED:
            self.scheduler.finish(sequence)
            self.strategy.release(sequence.key)


def _with_draft(row: Row | None, source: Source) -> Row:
    assert row is not None, "a sequence that decides has its row"
    return replace(row, draft_token_ids=source.draft) if source.draft else row


def _decided_with(row: Row) -> tuple[bool, int]:
    """Equal for rows that can only be decided together."""
    search = row.sampling.search is not None
    return search, row.group if search else row.key


def observes(row: Row) -> bool:
    """Whether the row's strategy looks at hidden states."""
    search = row.sampling.search
    return search is not None and search.observes


def failed(request_id: str, error: LorryError) -> Failed:
    """The message that ends a request with `error`."""
    return Failed(request_id, ErrorInfo(error.kind, error.message, error.fields))


def internal_error(where: str) -> LorryError:
    """What a client may know of the exception that is being handled: an id that the log also bears."""
    fault_id = uuid.uuid4().hex[:12]
    log.exception("fault %s in %s", fault_id, where)
    return LorryError(f"internal error {fault_id}", fault_id=fault_id)
