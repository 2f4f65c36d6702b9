"""What waits for one request's reader: bounded by the answer itself, however slowly it reads.

Text and tokens of a sequence that have not been read are one Delta, so at most n + 2 events wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lorry.server.frontend.request import Delta, Event, Finished, PromptLogprobs, Started
from lorry.server.params import TokenLogprobs


@dataclass(slots=True)
class _Unread:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: Finished | None = None


class Mailbox:
    """One writer, which never waits, and one reader."""

    def __init__(self, sequences: int, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._unfinished = sequences  # Finished that have not been read
        self._head: deque[Event] = deque()
        self._unread: dict[int, _Unread] = {}  # by index, in the order in which something came
        self._error: Exception | None = None
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Started | PromptLogprobs) -> None:
        self._head.append(event)
        self._wake()

    def add(self, index: int, text: str, token_ids: Iterable[int] = (), logprobs: Iterable[TokenLogprobs] = ()) -> None:
        """More of sequence `index`."""
        unread = self._unread.setdefault(index, _Unread())
        if text:
            unread.text.append(text)
        unread.token_ids.extend(token_ids)
        unread.logprobs.extend(logprobs)
        self._wake()

    def finish(self, finished: Finished) -> None:
        """The last event of a sequence."""
        self._unread.setdefault(finished.index, _Unread()).finished = finished
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with an error, after what has come before it."""
        self._error = self._error or error
        self._wake()

    def close(self) -> None:
        """The reader is gone; forget everything."""
        self._closed = True
        self._head.clear()
        self._unread.clear()
        self._wake()

    @property
    def exhausted(self) -> bool:
        """Nothing is left to read, and nothing will come."""
        return self._closed or self._unfinished == 0

    async def get(self) -> Event:
        """The next event; StopAsyncIteration after the last Finished or `close`, the error of `fail`."""
        while True:
            if (event := self._next()) is not None:
                return event
            if self.exhausted:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            assert self._waiter is None, "one reader"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _next(self) -> Event | None:
        if self._head:
            return self._head.popleft()
        while self._unread:
            index = next(iter(self._unread))
            unread = self._unread.pop(index)
            if unread.text or unread.token_ids:
                if unread.finished is not None:
                    self._unread[index] = _Unread(finished=unread.finished)
                logprobs = tuple(unread.logprobs) if self._with_logprobs else None
                return Delta(index, "".join(unread.text), tuple(unread.token_ids), logprobs)
            if unread.finished is not None:
                self._unfinished -= 1
                return unread.finished
        return None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
