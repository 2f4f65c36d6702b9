"""All requests in flight: who they are, who waits, and which handle each message of the engine is for.

    reserve ─▶ (tokenizing) ─▶ open ─▶ started ─▶ engine end ─▶ reader end
    └──────── in flight, its id is taken ──────────────────────────────┘
    └──────── waiting ────────────────┘

The engine knows a request by its id and a serial number, so that what is left of an aborted request on the line
is never taken for one that has the same id.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from lorry.server.engine import messages
from lorry.server.engine.messages import Command
from lorry.server.errors import AlreadyExists, LorryError, QueueFull, from_wire
from lorry.server.frontend.handle import Handle, Owner
from lorry.server.observability.metrics import Metrics

logger = logging.getLogger(__name__)

RequestMessage = messages.Started | messages.PromptLogprobs | messages.Tokens | messages.Failed


@dataclass(slots=True, eq=False)
class Entry:
    """One request in flight; `handle` is None while it is being prepared."""

    request_id: str
    wire_id: str
    handle: Handle | None = None
    aborted: bool = False


class Requests:
    """One event loop; nothing here waits."""

    def __init__(
        self, send: Callable[[Command], None], metrics: Metrics, max_waiting: int, on_empty: Callable[[], None]
    ) -> None:
        """`on_empty` is called whenever the last request in flight has gone."""
        self._max_waiting = max_waiting
        self._on_empty = on_empty
        self._serials = itertools.count(1)
        self._entries: dict[str, Entry] = {}  # by request id
        self._live: dict[str, Handle] = {}  # by wire id, while the engine computes it
        self._waiting: set[str] = set()  # wire ids
        self.owner = Owner(send, metrics, self._started, self._engine_end, self._reader_end)

    def __len__(self) -> int:
        return len(self._entries)

    def reserve(self, request_id: str) -> Entry:
        """Take the id and a place among those that wait. Raises AlreadyExists and QueueFull."""
        if request_id in self._entries:
            raise AlreadyExists(
                f"request {request_id!r} is in flight", resource_type="request", resource_name=request_id
            )
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} requests wait already", max_waiting=self._max_waiting)
        entry = Entry(request_id, f"{request_id}/{next(self._serials)}")
        self._entries[request_id] = entry
        self._waiting.add(entry.wire_id)
        return entry

    def give_up(self, entry: Entry) -> None:
        """The request could not be prepared."""
        self._waiting.discard(entry.wire_id)
        self._forget(entry.request_id)

    def open(self, entry: Entry, handle: Handle) -> None:
        """The handle takes the entry's place; an abort that came meanwhile takes effect."""
        entry.handle = handle
        self._live[entry.wire_id] = handle
        if entry.aborted:
            handle.abort()

    def abort(self, request_id: str) -> bool:
        """See `Frontend.abort`."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        entry.aborted = True
        if entry.handle is not None:
            entry.handle.abort()
        return True

    def abort_all(self) -> None:
        for request_id in list(self._entries):
            self.abort(request_id)

    def fail_all(self, error: LorryError) -> None:
        """The engine is gone, and with it everything that it computed."""
        for handle in list(self._live.values()):
            handle.fail(error)

    def dispatch(self, message: RequestMessage) -> None:
        """Hand a message to its request; a bug in one ends that one alone."""
        handle = self._live.get(message.request_id)
        if handle is None:
            return
        try:
            match message:
                case messages.Tokens():
                    handle.tokens(message)
                case messages.Started():
                    handle.started(message)
                case messages.PromptLogprobs():
                    handle.prompt_logprobs(message)
                case messages.Failed(error=error):
                    handle.fail(from_wire(error.kind, error.message, error.fields))
        except Exception as error:
            logger.exception("a message of the engine for request %s failed", handle.request_id)
            handle.abandon(error)

    def _started(self, handle: Handle) -> None:
        self._waiting.discard(handle.wire_id)

    def _engine_end(self, handle: Handle) -> None:
        self._waiting.discard(handle.wire_id)
        self._live.pop(handle.wire_id, None)

    def _reader_end(self, handle: Handle) -> None:
        self._forget(handle.request_id)

    def _forget(self, request_id: str) -> None:
        self._entries.pop(request_id, None)
        if not self._entries:
            self._on_empty()
