"""A frontend without an engine, and a real server and channel around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import grpc
import pytest

from lorry.server import errors
from lorry.server.config import ServerConfig
from lorry.server.engine.messages import (
    AdapterInfo,
    AdapterRef,
    AdapterState,
    FinishReason,
    ModelInfo,
    Timings,
)
from lorry.server.frontend.interface import AdapterChange, ChangeKind, Load, State
from lorry.server.frontend.request import (
    ChatPrompt,
    Delta,
    Event,
    Finished,
    PromptLogprobs,
    Request,
    Score,
    Started,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from lorry.server.observability.metrics import Metrics
from lorry.server.params import TokenLogprob, TokenLogprobs
from lorry.server.rpc.server import RunningServer, serve

REVISION = "0123456789abcdef" * 4

MODEL = ModelInfo(
    name="tiny",
    architecture="LlamaForCausalLM",
    parameters=12345,
    layers=3,
    hidden_size=77,
    vocab_size=211,
    context_length=513,
    eos_token_ids=(2, 7),
    dtype="float32",
    kv_dtype="bfloat16",
    adapter_dtype="bfloat16",
    device="cpu",
    bits_per_linear_weight=4.125,
    weight_bytes=54321,
    kv_blocks=99,
    block_size=16,
    adapter_pages=55,
    kernels="native",
    base_fingerprint="fedcba9876543210" * 4,
    draft_model="tinier",
)


def adapter_info(id: str, **changes: Any) -> AdapterInfo:
    values: dict[str, Any] = {
        "revision": REVISION,
        "rank": 40,
        "target_modules": ("q_proj", "v_proj"),
        "state": AdapterState.DEVICE,
        "pinned": False,
        "bytes": 4096,
        "in_flight": 3,
        "methods": ("rslora",),
    }
    return AdapterInfo(id=id, **(values | changes))


class FakeHandle:
    """Events from a queue: the test puts events or errors, None ends."""

    def __init__(self, request: Request) -> None:
        self.request_id = request.request_id
        self.request = request
        self.queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.aborted = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        item = await self.queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def put(self, *items: Event | Exception | None) -> None:
        for item in items:
            self.queue.put_nowait(item)

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed.set()

    async def __aenter__(self) -> FakeHandle:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class FakeAdapters:
    def __init__(self) -> None:
        self.known: dict[str, AdapterInfo] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.changes: list[asyncio.Queue[AdapterChange]] = []

    def _find(self, id: str) -> AdapterInfo:
        if id not in self.known:
            raise errors.NotFound(f"no adapter {id!r}", resource_type="adapter", resource_name=id)
        return self.known[id]

    async def load(
        self,
        id: str,
        path: str,
        *,
        expected_revision: str | None = None,
        pin: bool = False,
        replace: bool = False,
    ) -> AdapterInfo:
        self.calls.append(("load", id, path, expected_revision, pin, replace))
        self.known[id] = adapter_info(id, pinned=pin)
        return self.known[id]

    async def unload(self, id: str) -> AdapterInfo:
        self._find(id)
        return self.known.pop(id)

    async def pin(self, id: str, pinned: bool) -> AdapterInfo:
        self._find(id)
        self.known[id] = adapter_info(id, pinned=pinned)
        return self.known[id]

    async def get(self, id: str) -> AdapterInfo:
        return self._find(id)

    async def list(self, after: str = "", limit: int | None = None) -> list[AdapterInfo]:
        return [self.known[id] for id in sorted(self.known) if id > after][:limit]

    async def watch(self, ids: Collection[str] = ()) -> AsyncIterator[AdapterChange]:
        queue: asyncio.Queue[AdapterChange] = asyncio.Queue()
        self.changes.append(queue)
        try:
            for id, info in sorted(self.known.items()):
                if not ids or id in ids:
                    yield AdapterChange(ChangeKind.PRESENT, info)
            while True:
                yield await queue.get()
        finally:
            self.changes.remove(queue)


class FakeFrontend:
    """Takes requests, remembers them, and answers what the test puts into their handles."""

    def __init__(self) -> None:
        self.adapters = FakeAdapters()
        self.metrics = Metrics()
        self.state = State.SERVING
        self.start_time = 1234.5
        self.handles: asyncio.Queue[FakeHandle] = asyncio.Queue()
        self.refusal: Exception | None = None
        self.scored: tuple[Any, ...] | None = None
        self.tokenized: tuple[Any, ...] | None = None
        self.drain_timeouts: list[float | None] = []
        self._state_changed = asyncio.Event()

    @property
    def model_info(self) -> ModelInfo:
        if self.state is State.STARTING:
            raise errors.EngineUnavailable("the model is being loaded")
        return MODEL

    def set_state(self, state: State) -> None:
        self.state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()

    async def watch_state(self) -> AsyncIterator[State]:
        while True:
            changed = self._state_changed
            yield self.state
            await changed.wait()

    def load(self) -> Load:
        return Load(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def drain(self, timeout: float | None = None) -> int:
        self.drain_timeouts.append(timeout)
        return 11

    async def drained(self) -> None: ...

    async def submit(self, request: Request) -> FakeHandle:
        if self.refusal is not None:
            raise self.refusal
        handle = FakeHandle(request)
        self.handles.put_nowait(handle)
        return handle

    def abort(self, request_id: str) -> bool:
        return request_id == "in-flight"

    async def score(
        self,
        prompt: TextPrompt | TokenPrompt,
        continuation: Sequence[int],
        *,
        adapters: tuple[AdapterRef, ...] = (),
        entropy: bool = False,
        deadline: float | None = None,
    ) -> Score:
        self.scored = (prompt, tuple(continuation), adapters, deadline)
        return Score((-0.5, -1.5), (3, 4), (0.25, 0.75) if entropy else ())

    async def tokenize(self, prompt: TextPrompt | ChatPrompt, *, add_special_tokens: bool = True) -> list[int]:
        self.tokenized = (prompt, add_special_tokens)
        return [5, 6, 7]

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return f"{list(token_ids)} {skip_special_tokens}"


def events_of(request: Request) -> list[Event]:
    """A whole stream of two sequences, with everything that an event can hold."""
    usage = Usage(prompt_tokens=5, cached_tokens=3, completion_tokens=2)
    entry = TokenLogprobs(9, -0.25, 2, (TokenLogprob(8, -0.125), TokenLogprob(9, -0.25)))
    return [
        Started(request.request_id, 5, 3, (AdapterRef("pirate", -0.5, REVISION),)),
        PromptLogprobs((entry, entry)),
        Delta(1, "b", (9,), (entry,)),
        Delta(0, "a", (10,)),
        Finished(1, FinishReason.STOP, "end", usage, Timings(0.1, 0.2, 0.3)),
        Delta(0, "ä", (11,)),
        Finished(0, FinishReason.LENGTH, "", usage, Timings(0.25, 1.5, 2.000000001)),
    ]


@pytest.fixture
async def frontend() -> FakeFrontend:
    return FakeFrontend()


@pytest.fixture
async def server(frontend: FakeFrontend) -> AsyncIterator[RunningServer]:
    running = await serve(frontend, ServerConfig(port=0, max_message_bytes=1 << 20))
    try:
        yield running
    finally:
        await running.stop(0)


@pytest.fixture
async def channel(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as open_channel:
        yield open_channel


async def soon(condition: Any, seconds: float = 60.0) -> None:
    """Wait until `condition()` holds; fail after `seconds`."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not come true in time"
        await asyncio.sleep(0.005)


async def settled(queue: asyncio.Queue[Any]) -> int:
    """The length of `queue` once it has been the same for half a second."""
    length, since = queue.qsize(), time.monotonic()
    while time.monotonic() - since < 0.5:
        await asyncio.sleep(0.02)
        if queue.qsize() != length:
            length, since = queue.qsize(), time.monotonic()
    return length


class Helpers:
    """What tests need of this file; it cannot be imported."""

    REVISION = REVISION
    MODEL = MODEL
    events_of = staticmethod(events_of)
    adapter_info = staticmethod(adapter_info)
    soon = staticmethod(soon)
    settled = staticmethod(settled)


@pytest.fixture
def helpers() -> type[Helpers]:
    return Helpers
