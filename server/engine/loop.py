"""The engine: plan → forward → commit, until told to stop. One thread; commands take effect between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from lorry.adapters.segments import build_segments
from lorry.kernels.lora import Segments
from lorry.server.cache.block_table import Copy
from lorry.server.decoding.interface import Strategy
from lorry.server.engine.adapters import AdapterDesk
from lorry.server.engine.batch import Runs, build_batch
from lorry.server.engine.channel import Channel
from lorry.server.engine.commit import Committer, Flight, failed, internal_error
from lorry.server.engine.drafter import Drafter
from lorry.server.engine.grammars import GrammarDesk
from lorry.server.engine.graphs import page_bucket
from lorry.server.engine.messages import (
    Abort,
    AdapterReply,
    Command,
    EngineMessage,
    ErrorInfo,
    FinishReason,
    Generate,
    Shutdown,
    Started,
)
from lorry.server.engine.plan import Piece, Plan
from lorry.server.engine.report import Report
from lorry.server.engine.runner import Runner
from lorry.server.engine.scheduler import Scheduler
from lorry.server.engine.sequence import Request
from lorry.server.errors import DeadlineExceeded, InvalidField, LorryError, OutOfMemory

log = logging.getLogger(__name__)

BLOCKED_POLL = 0.002  # seconds between two looks while requests wait for adapters or adapters for the disk
IDLE_POLL = 1.0
LEAST_TOKENS = 16  # of a prompt that are tried when memory is short
MAX_FAULTS = 3  # steps in a row that fail whole before the engine gives up


class Engine:
    """Requests in, tokens out. ahead: plan a step while the one before runs, for a GPU. `clock` is time.time but in
    tests."""

    def __init__(
        self,
        channel: Channel,
        scheduler: Scheduler,
        runner: Runner,
        strategy: Strategy,
        adapters: AdapterDesk,
        eos_token_ids: tuple[int, ...],
        *,
        grammars: GrammarDesk | None = None,
        drafter: Drafter | None = None,
        ahead: bool = False,
        debug_checks: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.channel = channel
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self.grammars = grammars or GrammarDesk(None)
        self.drafter = drafter
        self.report = Report(scheduler)
        self.outbox: list[EngineMessage] = []
        self.committer = Committer(scheduler, runner, strategy, eos_token_ids, self.outbox)
        self.clock = clock
        self.stopped = False
        self._ahead = ahead
        self._flight: Flight | None = None  # the step that runs while the next is planned
        self._debug_checks = debug_checks
        self._build_segments = lru_cache(maxsize=16)(build_segments)
        self._orders = 0
        self._faults = 0

    def run(self) -> None:
        """Step until Shutdown."""
        while not self.stopped:
            if not self.step():
                self._idle()

    def step(self, wait: float = 0.0) -> bool:
        """One plan → forward → commit; False when there was nothing to run. Waits `wait` seconds for commands.

        Ahead, the commit is that of the step before: while this one runs, its tokens are read, and the next is planned.
        """
        for command in self.channel.receive(wait):
            try:
                self._obey(command)
            except Exception:
                self._refuse(command)
        for command in self.grammars.ready(self._no_grammar):
            self._go_on(command)
        self.adapters.poll(self.report, self.outbox)
        self._expire(self.clock())
        plan = self._plan()
        self._announce(plan)
        begun = time.perf_counter()
        before, self._flight = self._flight, self._launch(plan)
        if before is not None:
            self.committer.commit(before, self.clock())
        if self._flight is not None and (self._flight.waits or not self._ahead):
            self.committer.commit(self._flight, self.clock())
            self._flight = None
            if self.drafter is not None:
                self.drafter.saw(plan, time.perf_counter() - begun)
        elif self._flight is None and plan.pieces:
            self._run_apart(plan)
        self._send()
        return bool(plan.pieces) or before is not None

    def _plan(self) -> Plan:
        if self.drafter is None:
            return self.scheduler.plan(self.clock())
        plan = self.scheduler.plan(self.clock(), self.drafter.propose())
        self.drafter.complete(plan)
        return plan

    def _launch(self, plan: Plan) -> Flight | None:
        """Run the plan as one batch; None: there is nothing to run, or that failed."""
        if not plan.pieces:
            return None
        try:
            flight = self._run(plan.pieces, plan.copies, self._ahead)
        except torch.AcceleratorError:
            raise  # the device is lost to this process
        except Exception:
            log.exception("a step of %d pieces failed, running it in parts", len(plan.pieces))
            return None
        self._faults = 0
        return flight

    def _run(self, pieces: list[Piece], copies: list[Copy], begin: bool = False) -> Flight:
        batch = build_batch(pieces, copies, self._segments, self._end_segments)
        output = self.runner.forward(batch)
        for piece in pieces:
            self.scheduler.launched(piece)
        pending = self.committer.begin(batch, output) if begin else None
        return Flight(batch, output if pending is None else None, pending)

    def _run_apart(self, plan: Plan) -> None:
        """What could not run as one batch: part by part. Requests whose part fails then too are ended."""
        self.runner.kv.copy_blocks(plan.copies)
        done = 0
        for pieces in plan.parts():
            request = pieces[0].sequence.request
            if pieces[0].sequence not in request.live:
                continue
            try:
                self.committer.commit(self._run_alone(pieces), self.clock())
                done += 1
            except torch.AcceleratorError:
                raise
            except OutOfMemory as error:
                self.committer.fail(request, error)
                done += 1
            except Exception:
                self.committer.fault(request)
        self._faults = 0 if done else self._faults + 1
        if self._faults >= MAX_FAULTS:
            raise RuntimeError(f"{self._faults} steps in a row failed whole")

    def _run_alone(self, pieces: list[Piece]) -> Flight:
        """One of `Plan.parts`, or as much of a prompt as there is memory for; raises OutOfMemory."""
        while True:
            try:
                return self._run(pieces, [])
            except torch.OutOfMemoryError as error:
                piece = pieces[0]
                tokens = piece.stop - piece.start
                if tokens <= LEAST_TOKENS and not piece.draft:
                    raise OutOfMemory("the device has no memory left for this request") from error
            torch.cuda.empty_cache()
            end = min(piece.end, piece.start + max(LEAST_TOKENS, tokens // 2))
            pieces = [replace(piece, end=end, draft=())]

    def _segments(self, runs: Runs) -> Segments:
        """The segments of a batch, with the bound of their pages, which a GPU makes room for."""
        segments = self._build_segments(runs)
        if not self._ahead:
            return segments
        pages = max(self.adapters.page_bound(combo) for _, combo in runs)
        return replace(segments, page_bound=page_bucket(pages))

    def _end_segments(self, runs: Runs, logits_runs: Runs) -> Segments | None:
        """The segments of the rows of logits, where an adapter changes the embedding or the head."""
        pages = max(self.adapters.end_bound(combo) for _, combo in runs)
        if pages == 0:
            return None
        return replace(self._build_segments(logits_runs), page_bound=page_bucket(pages) if self._ahead else 0)

    def _obey(self, command: Command) -> None:
        match command:
            case Generate():
                self._receive(command)
            case Abort():
                if not self.grammars.follows(command):
                    self._go_on(command)
            case Shutdown():
                self.stopped = True
            case _:
                self.adapters.obey(command, self.outbox)

    def _refuse(self, command: Command) -> None:
        """Answer a command that met a bug; call it from an except block."""
        error = internal_error(f"command {type(command).__name__}")
        if isinstance(command, Generate):
            self.outbox.append(failed(command.request_id, error))
        elif not isinstance(command, Abort | Shutdown):
            self.outbox.append(AdapterReply(command.call_id, error=ErrorInfo(error.kind, error.message, error.fields)))

    def _receive(self, command: Generate) -> None:
        try:
            if not self.grammars.wants(command):
                self._submit(command)
        except LorryError as error:
            self.outbox.append(failed(command.request_id, error))

    def _go_on(self, command: Generate | Abort) -> None:
        """With what waits for no grammar, or does so no longer."""
        if isinstance(command, Generate):
            self._submit(command)
        elif request := self.scheduler.requests.get(command.request_id):
            self.committer.abort(request, command.index, self.clock())

    def _no_grammar(self, request_id: str, error: Exception) -> None:
        if not isinstance(error, LorryError):
            log.error("a grammar met a bug", exc_info=error)
            error = LorryError("internal error")
        self.outbox.append(failed(request_id, error))

    def _submit(self, command: Generate) -> None:
        try:
            vocab_size = self.runner.decoder.config.vocab_size
            if (
                command.prompt_token_ids
                and not 0 <= min(command.prompt_token_ids) <= max(command.prompt_token_ids) < vocab_size
            ):
                raise InvalidField(f"a token id is not within the vocabulary of {vocab_size}", field="prompt")
            lease = self.adapters.request(command.adapters)
            self._orders += 1
            try:
                self.scheduler.add(Request(command, self._orders, lease, self.grammars.grammar(command)))
            except LorryError:
                if lease is not None:
                    self.adapters.release(lease)
                raise
        except LorryError as error:
            self.outbox.append(failed(command.request_id, error))

    def _expire(self, now: float) -> None:
        for request, soft in self.scheduler.alarms.due(now):
            if soft:
                self.committer.finish_request(request, FinishReason.TIME_LIMIT, now)
            else:
                self.committer.fail(request, DeadlineExceeded("the deadline passed"))

    def _announce(self, plan: Plan) -> None:
        for request, error in plan.failed:
            self.outbox.append(failed(request.id, error))
        for request in plan.started:
            started = Started(request.id, len(request.prompt), request.cached_tokens, request.adapters)
            self.outbox.append(started)
            self.report.queue_seconds.append(max(0.0, (request.scheduled or 0.0) - request.message.arrival))

    def _send(self, idle: bool = False) -> None:
        now = self.clock()
        if idle or self.report.due(now):
            self.adapters.measure(self.report)
            self.grammars.measure(self.report)
            if self.drafter is not None:
                self.drafter.measure(self.report)
            if stats := self.report.stats(now):
                self.outbox.append(stats)
        if self.outbox:
            self.channel.send(self.outbox)
            self.outbox.clear()

    def _idle(self) -> None:
        """Nothing can run: sleep until a command, an alarm or an adapter."""
        if self.stopped:
            return
        if self._debug_checks:
            self.check()
        if self.scheduler.waiting or self.adapters.busy or self.grammars.busy:
            timeout = BLOCKED_POLL
        else:
            self._send(idle=True)
            timeout = IDLE_POLL
        if (alarm := self.scheduler.alarms.next) is not None:
            timeout = min(timeout, max(0.0, alarm - self.clock()))
        self.step(timeout)

    def check(self) -> None:
        """Prove the invariants of everything that allocates."""
        self.scheduler.check()
        self.adapters.check()
