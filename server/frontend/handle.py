"""One request in flight: the engine's messages come in, events for its reader go out, aborts go to the engine.

It ends twice: for the engine when no sequence computes any more (`on_engine_end`), for the reader when the last
event is read or the reader leaves (`on_reader_end`). The engine is told of an early end exactly once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from lorry.server.engine import messages
from lorry.server.engine.messages import Abort, AdapterRef, FinishReason, Generate, Timings
from lorry.server.errors import DeadlineExceeded
from lorry.server.frontend.mailbox import Mailbox
from lorry.server.frontend.output import SequenceOutput
from lorry.server.frontend.request import Event, Finished, PromptLogprobs, Started, Usage
from lorry.server.observability.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Owner:
    """What a handle needs of the frontend that made it."""

    send: Callable[[messages.Command], None]
    metrics: Metrics
    on_started: Callable[[Handle], None]
    on_engine_end: Callable[[Handle], None]
    on_reader_end: Callable[[Handle], None]


class Handle:
    """See `interface.RequestHandle`. Times are time.time()."""

    def __init__(
        self,
        command: Generate,
        request_id: str,
        outputs: Sequence[SequenceOutput],
        owner: Owner,
        *,
        prompt_text: str = "",
        empty_prompt_logprobs: bool = False,
    ) -> None:
        """`outputs`: one for each sequence. `prompt_text` goes before each text.

        `empty_prompt_logprobs`: they were asked for, but the prompt has one token, which has none.
        """
        self.wire_id = command.request_id
        self._request_id = request_id
        self._command = command
        self._outputs = outputs
        self._owner = owner
        self._prompt_text = prompt_text
        self._empty_prompt_logprobs = empty_prompt_logprobs
        self._mailbox = Mailbox(len(outputs), command.logprobs is not None)
        self._computing = set(range(len(outputs)))  # sequences that the engine has not ended
        self._started_at: float | None = None
        self._cached_tokens = 0
        self._first_token_at: float | None = None
        self._last_token_at = [0.0] * len(outputs)
        self._reader_left = False
        self._timer: asyncio.TimerHandle | None = None
        if command.deadline is not None:
            delay = max(command.deadline - time.time(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    # ---------------------------------------------------------------- the reader's side

    @property
    def request_id(self) -> str:
        return self._request_id

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            return await self._mailbox.get()
        except Exception:
            self._leave()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def abort(self) -> None:
        """End the request; the reader still gets what is there and Finished with ABORTED. Idempotent."""
        if not self._computing:
            return
        if self._started_at is None:
            self._start(0, self._command.adapters)
        for index in sorted(self._computing):
            text = self._outputs[index].end()
            self._mailbox.add(index, text)
            self._finish(index, FinishReason.ABORTED, "", None)
        self._tell_engine()
        self._engine_end(FinishReason.ABORTED.name.lower())

    def close(self) -> None:
        """The reader leaves: everything of the request is freed. Idempotent; after the end it does nothing."""
        if self._computing:
            self._tell_engine()
            self._engine_end("cancelled")
        self._mailbox.close()
        self._leave()

    # ---------------------------------------------------------------- the engine's side

    def started(self, message: messages.Started) -> None:
        """The engine has scheduled the prompt."""
        if self._computing and self._started_at is None:
            self._start(message.cached_tokens, message.adapters)
            self._owner.metrics.prompt_tokens.inc(message.prompt_tokens)

    def prompt_logprobs(self, message: messages.PromptLogprobs) -> None:
        if self._computing:
            self._mailbox.put(PromptLogprobs(tuple(message.logprobs)))

    def tokens(self, message: messages.Tokens) -> None:
        """New tokens of one sequence, perhaps its last."""
        index = message.index
        if index not in self._computing:
            return  # it ended here first; the engine's message crossed our Abort
        if message.token_ids:
            self._observe(index, len(message.token_ids))
        if self._started_at is None:  # its time was over before it was scheduled
            self._start(0, self._command.adapters)
        output = self._outputs[index]
        piece = output.push(message.token_ids, message.logprobs, message.finish)
        self._owner.metrics.generation_tokens.inc(len(piece.token_ids))
        self._mailbox.add(index, piece.text, piece.token_ids, piece.logprobs or ())
        if piece.reason is None:
            return
        self._finish(index, piece.reason, piece.stop, message.timings, message.score)
        self._computing.discard(index)
        if message.finish is None:
            self._owner.send(Abort(self.wire_id, index))
        if not self._computing:
            self._engine_end(piece.reason.name.lower())

    def fail(self, error: Exception) -> None:
        """The engine ended the whole request, or is gone: nothing more comes of it."""
        if self._computing:
            self._mailbox.fail(error)
            self._engine_end("deadline" if isinstance(error, DeadlineExceeded) else "error")

    def abandon(self, error: Exception) -> None:
        """End the request with an error that the engine does not know of."""
        if self._computing:
            self._tell_engine()
            self.fail(error)

    # ---------------------------------------------------------------- inside

    def _start(self, cached_tokens: int, adapters: tuple[AdapterRef, ...]) -> None:
        self._started_at = time.time()
        self._cached_tokens = cached_tokens
        prompt_tokens = len(self._command.prompt_token_ids)
        self._mailbox.put(Started(self._request_id, prompt_tokens, cached_tokens, adapters))
        if self._empty_prompt_logprobs:
            self._mailbox.put(PromptLogprobs(()))
        if self._prompt_text:
            for index in range(len(self._outputs)):
                self._mailbox.add(index, self._prompt_text)
        self._owner.on_started(self)

    def _observe(self, index: int, count: int) -> None:
        now, metrics = time.time(), self._owner.metrics
        if self._first_token_at is None:
            self._first_token_at = now
            metrics.time_to_first_token.observe(max(now - self._command.arrival, 0.0))
        elif self._last_token_at[index]:
            for _ in range(count):
                metrics.inter_token_latency.observe(max(now - self._last_token_at[index], 0.0) / count)
        self._last_token_at[index] = now

    def _finish(
        self, index: int, reason: FinishReason, stop: str, timings: Timings | None, score: float | None = None
    ) -> None:
        usage = Usage(len(self._command.prompt_token_ids), self._cached_tokens, self._outputs[index].completion_tokens)
        self._mailbox.finish(Finished(index, reason, stop, usage, timings or self._timings(index), score))

    def _timings(self, index: int) -> Timings:
        """As far as it is known here, for sequences that did not end in the engine."""
        now = time.time()
        started = self._started_at or now
        first = self._first_token_at or now
        last = self._last_token_at[index] or first
        return Timings(max(started - self._command.arrival, 0.0), max(first - started, 0.0), max(last - first, 0.0))

    def _expire(self) -> None:
        self.abandon(DeadlineExceeded("the deadline passed before the answer was complete"))

    def _tell_engine(self) -> None:
        self._owner.send(Abort(self.wire_id))

    def _engine_end(self, reason: str) -> None:
        self._computing.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._owner.metrics.request_finished(reason)
        if reason not in ("cancelled", "error", "deadline"):
            self._owner.metrics.e2e_request_latency.observe(max(time.time() - self._command.arrival, 0.0))
        self._owner.on_engine_end(self)

    def _leave(self) -> None:
        if not self._reader_left:
            self._reader_left = True
            self._owner.on_reader_end(self)
