"""The engine's process as the frontend sees it: started, listened to, watched and started again.

    start ─▶ Loading… ─▶ Ready ─▶ messages ─▶ exit ─▶ wait ─▶ start ─▶ …

The frontend binds one ZeroMQ PAIR socket (a Unix socket in a private folder, a new one for each start, so that
nothing of a dead engine reaches the next) and hands the engine its configuration as JSON on stdin. Each frame is
a MessagePack list: commands that were sent during one turn of the event loop travel together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from lorry.server.config import EngineConfig, to_json
from lorry.server.engine.messages import Command, EngineMessage, Loading, Ready, Shutdown

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "lorry.server.engine.process")
STABLE_SECONDS = 60.0  # an engine that served this long starts the backoff anew
SHUTDOWN_SECONDS = 5.0  # from Shutdown to SIGKILL; an engine that is not ready gets that at once
SPIN_COUNT = "3000"  # OpenMP's default spins for a whole time slice: beside a busy process a step of 55 ms took 720
RECORD = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+): (.*)")  # how the engine's log begins a line


class EngineFailed(Exception):
    """The engine never got ready; the message ends with its own last words."""


class EngineProcess:
    """Keeps one engine alive. Callbacks run in the event loop and must not block.

    on_messages: what the engine sent, in order, without Loading and Ready.
    on_loading, on_ready: progress, then the model; once for each start.
    on_down: the engine that was ready is gone; called at once, before any restart.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_messages: Callable[[list[EngineMessage]], None],
        on_loading: Callable[[Loading], None],
        on_ready: Callable[[Ready], None],
        on_down: Callable[[], None],
        backoff: float = 0.5,
        backoff_max: float = 30.0,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`backoff`, `backoff_max`: seconds before a restart, doubled for each death in a row."""
        self._config = config
        self._on_messages = on_messages
        self._on_loading = on_loading
        self._on_ready = on_ready
        self._on_down = on_down
        self._backoff = backoff
        self._backoff_max = backoff_max
        self._command = tuple(command)
        self._context = zmq.asyncio.Context()
        self._folder = tempfile.TemporaryDirectory(prefix="lorry-")
        self._starts = 0
        self._decoder = msgspec.msgpack.Decoder(list[EngineMessage])
        self._encoder = msgspec.msgpack.Encoder()
        self._socket: zmq.asyncio.Socket | None = None  # of an engine that is ready
        self._process: asyncio.subprocess.Process | None = None
        self._outbox: list[Command] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self._last_line = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the engine and return when it is ready. Raises EngineFailed when it exits before."""
        ready = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(ready), name="engine supervisor")
        await ready

    def send(self, command: Command) -> None:
        """Hand `command` to the engine at the end of this turn of the loop; dropped while there is none."""
        if self._socket is None:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(command)

    async def stop(self, at_once: bool = False) -> None:
        """Ask the engine to leave, then make it; `at_once`, or while it loads, do not ask. Idempotent."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None and not at_once:
            self.send(Shutdown())
            if self._socket is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
            if self._process is not None:
                await self._process.wait()
            self._context.destroy(linger=0)
            self._folder.cleanup()

    def _flush(self) -> None:
        if self._outbox and self._socket is not None:
            self._socket.send(self._encoder.encode(self._outbox))
        self._outbox.clear()

    async def _supervise(self, first: asyncio.Future[None]) -> None:
        delay = self._backoff
        while True:
            try:
                served = await self._run_once(first)
            except OSError as error:
                self._last_line = str(error)
                logger.error("the engine could not be started: %s", error)
                served = 0.0
            if self._stopping:
                return
            if not first.done():
                first.set_exception(EngineFailed(self._last_words()))
                return
            delay = self._backoff if served >= STABLE_SECONDS else delay
            logger.warning("the engine is started again in %.1f s", delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._backoff_max)

    async def _run_once(self, first: asyncio.Future[None]) -> float:
        """One life of an engine; returns for how many seconds it served."""
        loop = asyncio.get_running_loop()
        self._starts += 1
        self._last_line = ""
        address = f"ipc://{Path(self._folder.name) / f'engine-{self._starts}.sock'}"
        socket = self._context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.bind(address)
        ready_at = 0.0

        def ready(message: Ready) -> None:
            nonlocal ready_at
            ready_at = loop.time()
            self._socket = socket
            self._on_ready(message)
            if not first.done():
                first.set_result(None)

        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                "--socket",
                address,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ},
                limit=1 << 20,
                start_new_session=True,  # a terminal's Ctrl-C is for the frontend alone, which drains
            )
            self._process = process
            log = asyncio.create_task(self._forward_log(process))
            receiver = asyncio.create_task(self._receive(socket, ready))
            try:
                await self._hand_over_config(process)
                await process.wait()
            finally:
                receiver.cancel()
                if process.returncode is None:
                    _signal(process, signal.SIGKILL)
        finally:
            was_ready, self._socket = self._socket is not None, None
            self._outbox.clear()
            socket.close()
            if was_ready:
                self._on_down()
        await asyncio.wait((log,), timeout=0.2)  # its last lines; a grandchild may hold the pipe open
        log.cancel()
        if not self._stopping:
            logger.error("the engine %s", _exit_text(process.returncode))
        return loop.time() - ready_at if ready_at else 0.0

    async def _hand_over_config(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(to_json(self._config))
            await process.stdin.drain()
            process.stdin.close()

    async def _receive(self, socket: zmq.asyncio.Socket, ready: Callable[[Ready], None]) -> None:
        while True:
            frame = await socket.recv()
            try:
                messages = self._decoder.decode(frame)
                for at, message in enumerate(messages):
                    if isinstance(message, Ready):
                        ready(message)
                        messages = messages[at + 1 :]
                        break
                    if isinstance(message, Loading):
                        self._on_loading(message)
                if messages and self._socket is not None:
                    self._on_messages(messages)
            except Exception:
                logger.exception("a message of the engine could not be taken")

    async def _forward_log(self, process: asyncio.subprocess.Process) -> None:
        """Its lines become records of ours; one that does not begin like a record goes on with the one before."""
        assert process.stdout is not None
        level, name = logging.INFO, "lorry.engine"
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line longer than the limit
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            if record := RECORD.match(text):
                level, name, text = logging.getLevelNamesMapping()[record[1]], record[2], record[3]
            if text:
                self._last_line = text
                logging.getLogger(name).log(level, "%s", text)

    def _last_words(self) -> str:
        process = self._process
        exit_text = _exit_text(process.returncode if process else None)
        last = self._last_line or "it said nothing"
        return f"the engine {exit_text} before it was ready: {last}"


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "could not be started"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"exited with {code}"
