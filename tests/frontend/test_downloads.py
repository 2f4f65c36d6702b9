"""Adapters from sources as the frontend gets them: a process for each, ended with its client, and a new engine."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lorry.server.engine.messages import (
    AdapterInfo,
    AdapterReply,
    AdapterState,
    ErrorInfo,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)
from lorry.server.errors import AlreadyExists, Draining, MalformedAdapter, NotFound, PathRefused, SourceUnavailable
from lorry.server.frontend import downloads
from lorry.server.frontend.adapters import EngineAdapters
from lorry.server.frontend.downloads import Downloads
from lorry.server.sources.job import Job
from lorry.server.sources.uses import in_use

ADDRESS = "hf://org/name"
ALLOWED = ["hf://org"]

# Each stands for the process that fetches: stdin is `job` as JSON.
ANSWER = """
import json, sys
job = json.loads(sys.stdin.readline())
print(json.dumps({result}), flush=True)
"""
HANG = """
import os, pathlib, sys, time
pathlib.Path({mark!r}).with_suffix("." + str(os.getpid())).touch()
sys.stdin.read()
pathlib.Path({mark!r}).with_suffix(".ended").touch()
"""


@pytest.fixture
def downloading(tmp_path: Path) -> Callable[..., Downloads]:
    def make(script: str, **options: Any) -> Downloads:
        command = (sys.executable, "-c", script)
        return Downloads(ALLOWED, tmp_path / "store", command=command, **options)

    return make


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_the_answer_is_a_folder(downloading: Any, tmp_path: Path) -> None:
    echo = ANSWER.format(result="{'revision': f\"{job['source'][5:].replace('/', '-')}-{job['max_weights_bytes']}\"}")
    folder = await downloading(echo).fetch(ADDRESS + "/", 17)
    assert folder == str(tmp_path / "store/adapters/org-name-17")


async def test_what_is_in_use_is_known_to_others(downloading: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    fetching = downloading(ANSWER.format(result="{'revision': job['source'][-1]}"), cache_bytes=5)
    for name in "ab":
        await fetching.fetch(ADDRESS + name, 17)
    assert in_use(store) == {"a", "b"}, "before the engine hears of it"
    fetching.keep([str(store / "adapters/b")])
    assert in_use(store) == {"b"}
    fetching.close()
    assert in_use(store) == set()


async def test_the_process_knows_what_the_store_may_have(downloading: Any) -> None:
    echo = ANSWER.format(result="{'revision': str(job['cache_bytes'])}")
    assert (await downloading(echo, cache_bytes=5).fetch(ADDRESS, 17)).endswith("/5")
    assert (await downloading(echo).fetch(ADDRESS, 17)).endswith("/None")


async def test_an_error_is_what_the_process_says(downloading: Any) -> None:
    result = "{'kind': 'MalformedAdapter', 'message': 'too large', 'fields': {'field': 'x'}}"
    with pytest.raises(MalformedAdapter, match="too large") as raised:
        await downloading(ANSWER.format(result=result)).fetch(ADDRESS, 17)
    assert raised.value.fields == {"field": "x"}


async def test_a_process_that_dies(downloading: Any) -> None:
    with pytest.raises(SourceUnavailable, match="cannot be fetched now"):
        await downloading("raise SystemExit(3)").fetch(ADDRESS, 17)


async def test_the_real_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub may not be asked here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable, match="hf://org/name cannot be fetched now"):
        await Downloads(ALLOWED, tmp_path / "store").fetch(ADDRESS, 17)


async def test_what_is_not_allowed_starts_nothing(downloading: Any) -> None:
    fetching = downloading("raise SystemExit", seconds=0.0)
    for address in ("hf://organ/name", "https://example.org/a", "file:///etc", "hf://org/../name"):
        with pytest.raises(PathRefused):
            await fetching.fetch(address, 17)


async def test_its_time_is_limited(downloading: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"not fetched within 0\.2 seconds"):
        await downloading(HANG.format(mark=str(tmp_path / "x")), seconds=0.2).fetch(ADDRESS, 17)


async def test_a_few_at_a_time_and_none_outlives_its_client(
    downloading: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "AT_A_TIME", 2)
    fetching = downloading(HANG.format(mark=str(tmp_path / "x")))
    tasks = [asyncio.create_task(fetching.fetch(ADDRESS, 17)) for _ in range(3)]
    await until(lambda: len(list(tmp_path.glob("x.*"))) == 2)
    await asyncio.sleep(0.1)
    processes = set(fetching._running)
    assert len(processes) == 2
    tasks[0].cancel()
    await until(lambda: len(list(tmp_path.glob("x.*"))) == 3)
    assert sum(process.returncode == -9 for process in processes) == 1
    fetching.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, Draining, Draining]
    assert not fetching._running and not (tmp_path / "x.ended").exists()
    with pytest.raises(Draining):
        await fetching.fetch(ADDRESS, 17)


class Engine:
    """Answers what it is sent: adapters in `broken` cannot be read from where they were fetched to."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.fetched: list[str] = []
        self.broken: set[str] = set()
        self.kept: list[set[str]] = []
        self.adapters = EngineAdapters(self._take, lambda: None, self._fetch, self.kept.append)

    async def _fetch(self, address: str) -> str:
        self.fetched.append(address)
        if "absent" in address:
            raise NotFound("nothing there", resource_type="adapter source", resource_name=address)
        return f"/store/adapters/{len(self.fetched)}"

    def _take(self, command: Any) -> None:
        self.sent.append(command)
        asyncio.get_running_loop().call_soon(self._answer, command)

    def _answer(self, command: Any) -> None:
        id = getattr(command, "id", "")
        reply = AdapterReply(command.call_id, [AdapterInfo(id, "r", 5, (), AdapterState.DEVICE, False, 7, 0)])
        if isinstance(command, LoadAdapter) and command.fetched in self.broken:
            reply = AdapterReply(command.call_id, error=ErrorInfo("MalformedAdapter", "damaged", {}))
        self.adapters.replied(reply)

    def loads(self) -> list[tuple[str, str, bool, bool]]:
        loads = [command for command in self.sent if isinstance(command, LoadAdapter)]
        return [(load.id, load.fetched, load.pin, load.replace) for load in loads]


async def test_the_engine_hears_of_what_was_fetched_and_a_new_one_again() -> None:
    engine = Engine()
    await engine.adapters.load("local", "some/folder")
    await engine.adapters.load("a", ADDRESS, pin=True)
    await engine.adapters.load("a", ADDRESS, pin=True, replace=True)
    assert engine.fetched == [ADDRESS] * 2, "a replacement is fetched anew"
    first, second = "/store/adapters/1", "/store/adapters/2"
    assert engine.loads() == [("local", "", False, False), ("a", first, True, False), ("a", second, True, True)]
    assert engine.kept == [set(), {first}, {second}]
    engine.sent.clear()
    engine.adapters.engine_up()
    await until(lambda: not engine.adapters._open)
    assert engine.loads() == [("local", "", False, True), ("a", second, True, True)]
    assert engine.fetched == [ADDRESS] * 2, "it needs no source"


async def test_what_a_new_engine_cannot_read_is_fetched_again() -> None:
    engine = Engine()
    await engine.adapters.load("a", ADDRESS)
    await engine.adapters.pin("a", True)
    engine.broken.add("/store/adapters/1")
    engine.adapters.engine_up()
    await until(lambda: len(engine.loads()) == 3)
    assert engine.loads()[1:] == [("a", f"/store/adapters/{number}", False, True) for number in (1, 2)]
    await until(lambda: not engine.adapters._open and isinstance(engine.sent[-1], PinAdapter))
    engine.sent.clear()
    engine.adapters.engine_up()
    assert engine.loads() == [("a", "/store/adapters/2", False, True)]
    assert isinstance(engine.sent[1], PinAdapter)


async def test_an_adapter_that_was_unloaded_is_not_fetched_again() -> None:
    engine = Engine()
    await engine.adapters.load("a", ADDRESS)
    engine.broken.add("/store/adapters/1")
    engine.adapters.engine_up()
    await engine.adapters.unload("a")
    await until(lambda: not engine.adapters._open)
    assert engine.kept[-1] == set()
    assert engine.loads()[1:] == [("a", "/store/adapters/1", False, True)]
    assert isinstance(engine.sent[-1], UnloadAdapter)


async def test_a_taken_id_and_a_failed_fetch() -> None:
    engine = Engine()
    engine.adapters.engine_up()
    listing = engine.sent[0].call_id
    engine.adapters.replied(AdapterReply(listing, [AdapterInfo("a", "r", 5, (), AdapterState.DEVICE, False, 7, 0)]))
    with pytest.raises(AlreadyExists, match="the adapter a exists"):
        await engine.adapters.load("a", ADDRESS)
    assert engine.fetched == []
    with pytest.raises(NotFound):
        await engine.adapters.load("b", "hf://org/absent")
    assert engine.loads() == []


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server over a folder with an adapter of 999 + 5 bytes."""
    folder = tmp_path / "web/a"
    folder.mkdir(parents=True)
    for name, size in (("adapter_config.json", 5), ("adapter_model.safetensors", 999)):
        (folder / name).write_bytes(bytes(size))
    handler = functools.partial(Quiet, directory=str(folder.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


async def test_from_a_server_to_the_engine_and_to_the_next_one(
    serving: Any, seen: Any, web: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    job = Job(source="", root="", max_weights_bytes=0, plain_http=True)
    async with serving(downloads=Downloads([web], store, job=job)) as frontend:
        assert (await frontend.adapters.load("a", f"{web}/a")).id == "a"
        (folder,) = (store / "adapters").iterdir()
        assert sorted(path.stat().st_size for path in folder.iterdir()) == [5, 999]
        assert f"fetched='{folder}'" in seen("LoadAdapter")[0]
        (tmp_path / "web/a/adapter_model.safetensors").write_bytes(bytes(1001))
        with pytest.raises(MalformedAdapter, match="1001 bytes, an adapter of this base has at most 1000"):
            await frontend.adapters.load("b", f"{web}/a")
        with pytest.raises(PathRefused):
            await frontend.adapters.load("b", "https://example.org/a")
        os.kill(frontend.engine_pid, signal.SIGKILL)
        await until(lambda: len(seen("LoadAdapter")) == 2)
        assert f"fetched='{folder}'" in seen("LoadAdapter")[1]
        assert in_use(store) == {folder.name}
    assert in_use(store) == set()
