"""Start `lorry serve` for a benchmark, wait until it serves, end it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_TIMEOUT = 600.0  # seconds; the first start converts the model and compiles the kernels
STOP_TIMEOUT = 30.0


@dataclass(frozen=True)
class Server:
    """One that serves: its address, its process, seconds from start to serving."""

    target: str
    pid: int
    seconds: float


@contextmanager
def lorry_server(model: str, adapters: Path, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server of `model` and of the adapters in a folder, serving until the block ends.

    Raises RuntimeError with the end of its log when it does not come to serve.
    """
    with started(model, adapters, log, options) as server:
        yield server.target


@contextmanager
def started(model: str, adapters: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """The same, with what else there is to know of it."""
    target = f"127.0.0.1:{free_port()}"
    lorry = Path(sys.executable).with_name("lorry")
    command = [str(lorry), "serve", "--model", model, "--adapters", str(adapters), "--port", target.split(":")[1]]
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(target, process, log)
        yield Server(target, process.pid, time.monotonic() - begin)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(target: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    with grpc.insecure_channel(target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods
        while time.monotonic() < deadline and process.poll() is None:
            try:
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0).status
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"lorry serve does not serve; the end of {log.name}:\n{tail}")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
