"""The process from start to exit code, over the scripted engine and a real channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from fake_engine import ECHO, FOREVER
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.v1 import generation_pb2, generation_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A server process, its first line and a channel to it."""

    def __init__(self, process, line, channel):
        self.process, self.line, self.channel = process, line, channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def stream(self, *ids, **fields):
        spec = generation_pb2.GenerationSpec(token_ids=generation_pb2.TokenIds(ids=ids), **fields)
        return self.generation.GenerateStream(generation_pb2.GenerateStreamRequest(spec=spec))

    async def status(self):
        return (await self.health.Check(health_pb2.HealthCheckRequest())).status

    def engine_pid(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = map(int, children)
        return pid

    async def until(self, status):
        """Wait until health says `status`."""
        async for answer in self.health.Watch(health_pb2.HealthCheckRequest(), timeout=60):
            if answer.status == status:
                return

    async def exit_code(self):
        return await asyncio.wait_for(self.process.wait(), 60)


def read(url):
    with urllib.request.urlopen(url, timeout=60) as page:
        return page.read().decode()


async def spawn(script="", drain_timeout=600.0, port=0):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("serve_fake.py")),
        script,
        str(drain_timeout),
        str(port),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@contextlib.asynccontextmanager
async def server(*args, **options):
    process = await spawn(*args, **options)
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        assert line.startswith("serving"), line + (await process.stderr.read()).decode()
        async with grpc.aio.insecure_channel(re.search(r" on (\S+)", line)[1]) as channel:
            yield Server(process, line, channel)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_serve_until_sigterm():
    async with server() as serving:
        assert re.match(r"serving fake on 127\.0\.0\.1:\d+ · adapters: none · base 0 MB \(4\.13 bits", serving.line)
        page = re.search(r"metrics on (\S+)", serving.line)[1]
        assert await serving.status() == SERVING
        events = [event async for event in serving.stream(ECHO, 30, 40)]
        assert [event.WhichOneof("event") for event in events][-1] == "finished"
        body = await asyncio.to_thread(read, page)
        method = "/lorry.v1.GenerationService/GenerateStream"
        assert f'lorry_grpc_requests_total{{code="OK",method="{method}"}} 1.0' in body
        watch = aiter(serving.health.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING

        call = serving.stream(FOREVER)
        stream = aiter(call)
        await anext(stream)
        serving.process.send_signal(signal.SIGTERM)
        assert (await anext(watch)).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(serving.stream(ECHO, 30)))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "draining" in refused.value.details()
        await anext(stream)
        assert serving.process.returncode is None
        call.cancel()
        await serving.channel.close()
        assert await serving.exit_code() == 0


async def test_a_drain_ends_streams_when_its_time_is_over():
    async with server(drain_timeout=0.3) as serving:
        stream = aiter(serving.stream(FOREVER))
        await anext(stream)
        serving.process.send_signal(signal.SIGTERM)
        last = None
        async for event in stream:
            last = event
        assert last.finished.reason == generation_pb2.FINISH_REASON_ABORTED
        assert await serving.exit_code() == 0


async def test_a_second_signal_leaves_at_once():
    async with server() as serving:
        stream = serving.stream(FOREVER)
        await stream.read()
        engine = serving.engine_pid()
        serving.process.send_signal(signal.SIGINT)
        await serving.until(NOT_SERVING)
        await stream.read()
        assert serving.process.returncode is None
        serving.process.send_signal(signal.SIGTERM)
        assert await serving.exit_code() == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)


async def test_the_death_of_the_engine_is_seen_by_clients_and_healed():
    async with server() as serving:
        stream = aiter(serving.stream(FOREVER))
        await anext(stream)
        watch = aiter(serving.health.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        assert (await anext(watch)).status == SERVING
        os.kill(serving.engine_pid(), signal.SIGKILL)
        async with asyncio.timeout(60):
            with pytest.raises(grpc.aio.AioRpcError) as died:
                async for _ in stream:
                    pass
        assert died.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [(await anext(watch)).status for _ in range(2)] == [NOT_SERVING, SERVING]
        assert [event async for event in serving.stream(ECHO, 30)]


async def test_an_engine_that_never_gets_ready_is_the_servers_end():
    process = await spawn("fail")
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"there is no model 'fail'" in err
    assert b"Traceback" not in err and out == b""


async def test_a_taken_port_is_the_servers_end():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await spawn(port=taken.getsockname()[1])
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert b"taken" in err and b"Traceback" not in err and out == b""


async def test_a_signal_while_the_engine_loads_leaves_with_0():
    process = await spawn("hang")
    async for line in process.stderr:
        if b"hanging" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 60) == 0
