"""The whole server in one process with one engine below it, from its configuration to its exit code.

listen (NOT_SERVING) ─▶ engine loads ─▶ SERVING ─▶ SIGTERM, SIGINT or Drain ─▶ streams finish ─▶ exit 0
                           └ never ready: exit 1             └ a second signal: exit at once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Coroutine
from typing import Any

from lorry.server.config import ServerConfig
from lorry.server.errors import EngineUnavailable
from lorry.server.frontend.engine_process import EngineFailed
from lorry.server.frontend.frontend import EngineFrontend
from lorry.server.frontend.interface import State
from lorry.server.frontend.progress import LoadingProgress
from lorry.server.observability import logs
from lorry.server.observability.page import metrics_page
from lorry.server.rpc.server import RunningServer, serve

logger = logging.getLogger(__name__)

LAST_WRITES_SECONDS = 2.0  # calls whose request has ended write their last messages
NAMES_SHOWN = 8


def run(config: ServerConfig) -> int:
    """Serve until told to stop. Returns 0 after a drain, 1 when the server cannot start, 128 + signal number when a
    second signal cut the drain short."""
    logs.set_up(config.log_format, config.log_level)
    return asyncio.run(_run(config))


class _Signals:
    """The first signal begins the drain, the second ends everything."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.exit_code = 0
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.exit_code = 128 + number
            self.second.set()
        self.first.set()


async def _run(config: ServerConfig) -> int:
    signals = _Signals()
    progress = LoadingProgress()
    with contextlib.ExitStack() as stack:
        frontend = EngineFrontend(config, on_loading=progress)
        try:
            metrics_port = stack.enter_context(metrics_page(frontend.metrics, config.host, config.metrics_port))
            server = await serve(frontend, config)
        except OSError as error:
            logger.error("%s", error)
            return 1
        try:
            started = _start(frontend, progress, config, server, metrics_port)
            if await _first(started, signals.first.wait()) == 0:
                await _first(frontend.drained(), signals.first.wait())
                frontend.drain()
                await _first(frontend.drained(), signals.second.wait())
            at_once = signals.second.is_set()
            await server.stop(0.0 if at_once else LAST_WRITES_SECONDS)
            await frontend.stop(at_once=at_once)
        except EngineFailed as error:
            logger.error("%s", error)
            await server.stop(0.0)
            await frontend.stop(at_once=True)
            return 1
        return signals.exit_code


async def _first(*coroutines: Coroutine[Any, Any, Any]) -> int:
    """Which of them ended first, the others cancelled; raises what it raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        winner = next(at for at, task in enumerate(tasks) if task.done())
        tasks[winner].result()
        return winner
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _start(
    frontend: EngineFrontend,
    progress: LoadingProgress,
    config: ServerConfig,
    server: RunningServer,
    metrics_port: int | None,
) -> None:
    """Start the engine and print the line that says so, even if it dies and is replaced in between."""
    with progress:
        await frontend.start()
    async for state in frontend.watch_state():
        if state is State.DRAINING:
            return
        if state is State.SERVING:
            with contextlib.suppress(EngineUnavailable):
                print(await _serving_line(frontend, config, server, metrics_port), flush=True)
                return


async def _serving_line(
    frontend: EngineFrontend, config: ServerConfig, server: RunningServer, metrics_port: int | None
) -> str:
    model = frontend.model_info
    names = [adapter.id for adapter in await frontend.adapters.list()]
    shown = ", ".join(names[:NAMES_SHOWN]) or "none"
    if len(names) > NAMES_SHOWN:
        shown += f" and {len(names) - NAMES_SHOWN} more"
    parts = [
        f"serving {model.name} on {config.host}:{server.port}",
        f"adapters: {shown}",
        f"base {model.weight_bytes / 1e6:.0f} MB ({model.bits_per_linear_weight:.2f} bits per linear weight)",
        f"{model.kv_blocks * model.block_size} tokens of KV cache",
        f"{model.adapter_pages} adapter pages",
    ]
    if metrics_port is not None:
        parts.append(f"metrics on http://{config.host}:{metrics_port}/metrics")
    return " · ".join(parts)
