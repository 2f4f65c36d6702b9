"""The engine as a process: what the frontend sees from spawn to exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from lorry.server.config import MIB, EngineConfig, to_json
from lorry.server.engine.messages import (
    Abort,
    Command,
    EngineMessage,
    GetAdapters,
    Loading,
    Ready,
    Shutdown,
    Speculation,
    Started,
    Stats,
    Tokens,
)
from lorry.server.engine.process import EXIT_REFUSED

COMMAND = [sys.executable, "-m", "lorry.server.engine.process", "--socket"]
PATIENCE = 90.0


class Frontend:
    """The other end of the line."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/s"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.bind(self.address)
        self.encode = msgspec.msgpack.Encoder().encode
        self.decode = msgspec.msgpack.Decoder(list[EngineMessage]).decode
        self.seen: list[EngineMessage] = []

    def start(self, config: EngineConfig) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*COMMAND, self.address], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(to_json(config))
        process.stdin.close()
        return process

    def send(self, *commands: Command) -> None:
        self.socket.send(self.encode(list(commands)))

    def until(self, wanted: Callable[[EngineMessage], bool]) -> EngineMessage:
        """Read until a message is wanted; all that is read goes to `seen`."""
        end = time.monotonic() + PATIENCE
        found = None
        while found is None:
            assert self.socket.poll(max(0.0, end - time.monotonic()) * 1000), "the engine is silent"
            for message in self.decode(self.socket.recv()):
                self.seen.append(message)
                if found is None and wanted(message):
                    found = message
        return found

    def stats(self) -> list[Stats]:
        return [message for message in self.seen if isinstance(message, Stats)]

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    with tempfile.TemporaryDirectory() as folder:
        frontend = Frontend(Path(folder))
        yield frontend
        frontend.close()


@pytest.fixture
def config(model_folder: Path, adapters_dir: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model_folder),
        adapters_dir=str(adapters_dir),
        adapter_memory=8 * MIB,
        kv_memory=4 * MIB,
        threads=1,
        debug_checks=True,
    )


def is_last(name: str) -> Callable[[EngineMessage], bool]:
    return lambda m: isinstance(m, Tokens) and m.request_id == name and m.finish is not None


def queued(stats: list[Stats]) -> int:
    """Requests whose time in the queue was reported."""
    return sum(len(h.values) for each in stats for h in each.histograms if h.name == "request_queue_seconds")


def test_from_spawn_to_exit(frontend: Frontend, config: EngineConfig, generate: Any) -> None:
    process = frontend.start(replace(config, draft_model=config.model))
    ready = frontend.until(lambda message: isinstance(message, Ready))
    assert isinstance(ready, Ready) and ready.pid == process.pid
    assert ready.model.vocab_size == 131 and ready.model.context_length == 300 and ready.model.block_size == 16
    assert "/" not in ready.model.name and ready.model_folder == config.model
    assert ready.model.draft_model == ready.model.name
    stages = [message.stage for message in frontend.seen[:-1] if isinstance(message, Loading)]
    assert list(dict.fromkeys(stages)) == ["load", "warm up"]

    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's business
        process.send_signal(number)
    frontend.send(
        generate("a", [5, 6, 7], 5, adapters={"a": 1.0}, arrival=time.time()),
        generate("b", list(range(2, 40)), 5, n=2, shaping={"speculation": Speculation("draft_model")}),
        GetAdapters(7, "a"),
    )
    frontend.until(is_last("a"))
    if not any(is_last("b")(message) and message.index == 1 for message in frontend.seen):  # type: ignore[union-attr]
        frontend.until(lambda m: is_last("b")(m) and m.index == 1)  # type: ignore[union-attr]
    started = [message for message in frontend.seen if isinstance(message, Started)]
    assert {message.request_id: message.prompt_tokens for message in started} == {"a": 3, "b": 38}
    assert next(m for m in started if m.request_id == "a").adapters[0].revision
    stats = frontend.stats()
    while queued(stats) < 2 or stats[-1].running > 0:
        frontend.until(lambda message: isinstance(message, Stats))
        stats = frontend.stats()
    assert queued(stats) == 2
    drafted = sum((Counter(each.drafted) for each in stats), Counter[str]())
    assert drafted.keys() == {"draft_model"} and drafted["draft_model"] > 0
    assert all(each.accepted == each.drafted for each in stats), "the model does not agree with itself"
    assert sum(each.adapter_loads.get("ok", 0) for each in stats) == 1 and stats[-1].adapters_loaded == 1
    adapters = [each.adapters for each in stats if each.adapters is not None]
    assert adapters[-1].on_device == ("a",) and adapters[-1].by_tier["device"] == 1 and adapters[-1].room > 0
    assert sum(each.found.get("disk", 0) for each in adapters) == 1

    frontend.send(generate("long", [5, 6], 250))
    frontend.until(lambda message: isinstance(message, Started) and message.request_id == "long")
    frontend.send(Abort("long"), Shutdown())
    frontend.until(is_last("long"))
    assert process.wait(PATIENCE) == 0


def test_it_goes_with_its_parent(frontend: Frontend, config: EngineConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(to_json(config))
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen({[*COMMAND, frontend.address]!r}, stdin=open({str(tmp_path / 'config.json')!r}))\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    ready = frontend.until(lambda message: isinstance(message, Ready))
    assert isinstance(ready, Ready)
    process.kill()
    process.wait()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and is_alive(ready.pid):
        time.sleep(0.02)
    assert not is_alive(ready.pid)


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@pytest.mark.parametrize("given", [b"not json", b'{"max_running": "many"}', b'{"draft_tokens": 0}'])
def test_a_bad_configuration_is_refused(frontend: Frontend, given: bytes) -> None:
    done = subprocess.run([*COMMAND, frontend.address], input=given, capture_output=True, timeout=PATIENCE)
    assert done.returncode == EXIT_REFUSED
    assert b"Traceback" not in done.stderr


def test_a_model_that_is_not_there_is_refused(frontend: Frontend, tmp_path: Path) -> None:
    config = to_json(EngineConfig(model=str(tmp_path / "nothing")))
    done = subprocess.run([*COMMAND, frontend.address], input=config, capture_output=True, timeout=PATIENCE)
    assert done.returncode == EXIT_REFUSED
    assert b"ERROR" in done.stderr and b"Traceback" not in done.stderr
