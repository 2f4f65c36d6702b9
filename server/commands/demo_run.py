"""What `lorry demo` does: a real server below, streams side by side, and the server's own word on the batch.

Two rounds: the answers, for people; then the same prompts for a fixed number of tokens, where every sequence runs
to the end, for the figures. In both, GetLoad is asked how many sequences share the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console

from lorry.server.commands.client import describe
from lorry.server.commands.demo_view import view
from lorry.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc

MEASURED_TOKENS = 48
ASK_EVERY = 0.02  # seconds between two questions for the load
READY_PREFIX = "serving "


class DemoFailed(Exception):
    """The demo did not show what it is for; the message says why."""


@dataclass
class Answer:
    """One stream: the base (no adapter) or one adapter."""

    title: str
    adapter: str | None
    text: str = ""
    tokens: int = 0
    finished: bool = False


@dataclass
class Round:
    """What one round showed."""

    answers: Sequence[Answer]
    seconds: float = 0.0
    most_running: int = 0

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)


async def run(question: str, adapters: Path, names: Sequence[str], model: str | None, max_new_tokens: int) -> None:
    """Raises DemoFailed when the server does not start, a stream fails, or the streams did not share a batch."""
    console = Console()
    async with _server(adapters, model) as (address, line):
        console.print(line, highlight=False, soft_wrap=True)
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                shown = await _answers(console, channel, question, names, max_new_tokens)
                measured = await _round(channel, question, names, MEASURED_TOKENS, True)
                alone = await _round(channel, question, (), MEASURED_TOKENS, True)
            except grpc.RpcError as error:
                raise DemoFailed(describe(error)) from None
    _report(console, shown, measured, alone)


@contextlib.asynccontextmanager
async def _server(adapters: Path, model: str | None) -> AsyncIterator[tuple[str, str]]:
    """A server on a free port, its address and the line that it printed; SIGTERM and exit 0 at the end."""
    arguments = ["serve", "--port", "0", "--log-level", "warning", "--adapters", str(adapters)]
    if model is not None:
        arguments += ["--model", model]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lorry.server.cli", *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode().strip()
        if not line.startswith(READY_PREFIX):
            raise DemoFailed(f"the server did not start (exit code {await process.wait()})")
        yield line.split(" on ", 1)[1].split(" ", 1)[0], line
        process.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(process.wait(), 30)
        if code != 0:
            raise DemoFailed(f"the server exited with {code}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _answers(
    console: Console, channel: grpc.aio.Channel, question: str, names: Sequence[str], max_new_tokens: int
) -> Round:
    """The first round, shown while it runs."""
    answers = _streams(names)
    with view(console, question, answers):
        return await _round(channel, question, names, max_new_tokens, False, answers)


def _streams(names: Sequence[str]) -> list[Answer]:
    return [Answer("base", None), *(Answer(name, name) for name in names)]


async def _round(
    channel: grpc.aio.Channel,
    question: str,
    names: Sequence[str],
    max_new_tokens: int,
    to_the_end: bool,
    answers: Sequence[Answer] | None = None,
) -> Round:
    """Ask everyone at once; `to_the_end`: every sequence gets all its tokens."""
    answers = answers or _streams(names)
    result = Round(answers)
    watcher = asyncio.ensure_future(_watch_load(channel, result))
    began = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(_follow(channel, _spec(question, answer, max_new_tokens, to_the_end), answer))
    except* grpc.RpcError as errors:
        raise errors.exceptions[0] from None
    finally:
        result.seconds = time.monotonic() - began
        watcher.cancel()
        await asyncio.wait((watcher,))
    return result


def _spec(question: str, answer: Answer, max_new_tokens: int, to_the_end: bool) -> generation_pb2.GenerationSpec:
    spec = generation_pb2.GenerationSpec()
    spec.chat.messages.add(role="user", content=question)
    if answer.adapter is not None:
        spec.adapters.add(id=answer.adapter)
    spec.sampling.temperature = 0
    spec.stopping.max_new_tokens = max_new_tokens
    spec.stopping.ignore_eos = to_the_end
    return spec


async def _follow(channel: grpc.aio.Channel, spec: generation_pb2.GenerationSpec, answer: Answer) -> None:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
    async for event in stub.GenerateStream(generation_pb2.GenerateStreamRequest(spec=spec)):
        if event.HasField("delta"):
            answer.text += event.delta.text
            answer.tokens += len(event.delta.token_ids)
        elif event.HasField("finished"):
            answer.finished = True


async def _watch_load(channel: grpc.aio.Channel, result: Round) -> None:
    stub: Any = control_pb2_grpc.ControlServiceStub(channel)
    while True:
        load = await stub.GetLoad(control_pb2.GetLoadRequest())
        result.most_running = max(result.most_running, load.running)
        await asyncio.sleep(ASK_EVERY)


def _report(console: Console, shown: Round, measured: Round, alone: Round) -> None:
    """The figures; raises DemoFailed when the streams never shared a batch."""
    streams = len(shown.answers)
    speed, solo = measured.tokens / measured.seconds, alone.tokens / alone.seconds
    for line in (
        f"{streams} answers: {shown.tokens} tokens in {shown.seconds:.1f} s",
        f"all {streams} for {MEASURED_TOKENS} tokens each: {speed:.0f} tokens/s together, "
        f"{speed / streams:.0f} a stream; one alone: {solo:.0f} tokens/s",
        f"in one batch: GetLoad said {max(shown.most_running, measured.most_running)} sequences running",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    running = max(shown.most_running, measured.most_running)
    if running < streams:
        raise DemoFailed(f"{streams} streams, but at most {running} shared a batch")
