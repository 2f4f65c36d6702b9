"""What the rooms above the frontend (rpc, cli) may call; tests of theirs bring their own implementation.

Everything runs in one asyncio loop. Methods raise `lorry.server.errors.LorryError`s and nothing else
that a client can cause.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorry.server.engine.messages import AdapterInfo, AdapterRef, ModelInfo
from lorry.server.frontend.request import ChatPrompt, Event, Request, Score, TextPrompt, TokenPrompt
from lorry.server.observability.metrics import Metrics


class State(enum.IntEnum):
    """What the server does; the values equal `lorry.v1.ServerState`."""

    STARTING = 1
    SERVING = 2
    DRAINING = 3
    DOWN = 4


class ChangeKind(enum.IntEnum):
    """What happened to a watched adapter; the values equal `lorry.v1.AdapterEventType`."""

    PRESENT = 1
    CHANGED = 2
    REMOVED = 3


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """One adapter at one moment."""

    kind: ChangeKind
    adapter: AdapterInfo


@dataclass(frozen=True, slots=True)
class Load:
    """How full the server is; the engine's numbers are at most a second old."""

    running: int
    waiting: int
    max_running: int
    max_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    adapter_pages_used: int
    adapter_pages_total: int
    adapters_loaded: int
    in_flight: int
    """Requests between submit and their last event."""


class RequestHandle(Protocol):
    """One request in flight: an async iterator over its events, for one reader.

    Iterating ends after the `Finished` of every sequence, or raises the LorryError that ended the request.
    A reader that leaves early must `close` it (or use it as an async context manager); then the engine is
    told once. A slow reader finds its deltas joined: at most one is pending for each sequence.
    """

    @property
    def request_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    def abort(self) -> None:
        """End the request; the reader still gets what is there and Finished with ABORTED. Idempotent."""

    def close(self) -> None:
        """The reader leaves: everything of the request is freed. Idempotent; after the end it does nothing."""

    async def __aenter__(self) -> RequestHandle: ...

    async def __aexit__(self, *exc: object) -> None: ...


class Adapters(Protocol):
    """The adapters that the engine knows. Every method may raise EngineUnavailable."""

    async def load(
        self,
        id: str,
        path: str,
        *,
        expected_revision: str | None = None,
        pin: bool = False,
        replace: bool = False,
    ) -> AdapterInfo:
        """Register a folder under `id` and bring it to the device; returns when it is there.

        path: below a local root, or an allowed address, which is fetched first.
        """

    async def unload(self, id: str) -> AdapterInfo:
        """Forget `id`; requests in flight finish. NotFound when unknown."""

    async def pin(self, id: str, pinned: bool) -> AdapterInfo:
        """Hold `id` on the device, or hold it no longer. NotFound when unknown."""

    async def get(self, id: str) -> AdapterInfo:
        """NotFound when unknown."""

    async def list(self, after: str = "", limit: int | None = None) -> list[AdapterInfo]:
        """At most `limit` of them (None: all), ordered by id, from the first behind the id `after` on."""

    def watch(self, ids: Collection[str] = ()) -> AsyncIterator[AdapterChange]:
        """Every known adapter (of `ids`, if any) as PRESENT, then changes; a slow reader gets the last of each.

        Never ends by itself; close it with `aclose` or by cancelling the task that reads it.
        """


class Frontend(Protocol):
    """The server without its wire: from `Request`s to `Event`s."""

    @property
    def adapters(self) -> Adapters: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def state(self) -> State: ...

    @property
    def start_time(self) -> float:
        """time.time() at which the server was started."""

    def watch_state(self) -> AsyncIterator[State]:
        """The state now, then each change (a slow reader gets the last one). Never ends by itself."""

    @property
    def model_info(self) -> ModelInfo:
        """Raises EngineUnavailable before the engine was ready for the first time."""

    def load(self) -> Load:
        """How full the server is; all zeros but the limits before the engine is ready."""

    async def start(self) -> None:
        """Start the engine and return when it serves; raises EngineFailed when it cannot."""

    async def stop(self) -> None:
        """End every request that is left and the engine. Idempotent."""

    def drain(self, timeout: float | None = None) -> int:
        """Refuse new requests from now on, abort what is left after `timeout` seconds (None: the configured time).

        Returns how many requests are in flight. A second call may only shorten the time.
        """

    async def drained(self) -> None:
        """Returns when a drain was begun and no request is in flight any more, or its time is over."""

    async def submit(self, request: Request) -> RequestHandle:
        """Tokenize, check against the model and hand to the engine.

        Raises InvalidField, PromptTooLong, QueueFull, AlreadyExists (request_id in flight), Draining,
        EngineUnavailable, DeadlineExceeded; NotFound and the like for adapters come from the handle.
        """

    def abort(self, request_id: str) -> bool:
        """`RequestHandle.abort` by id; False when no request of that id is in flight."""

    async def score(
        self,
        prompt: TextPrompt | TokenPrompt,
        continuation: Sequence[int],
        *,
        adapters: tuple[AdapterRef, ...] = (),
        entropy: bool = False,
        deadline: float | None = None,
    ) -> Score:
        """Log-probabilities of a given continuation; errors as of `submit` and the handle."""

    async def tokenize(self, prompt: TextPrompt | ChatPrompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids as Generate would see them; a chat template brings its own special tokens."""

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; InvalidField for ids outside the vocabulary."""
