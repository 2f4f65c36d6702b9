"""The gRPC server: services, health, reflection and the channel's limits put together."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lorry.server.config import ServerConfig
from lorry.server.frontend.interface import Frontend, State
from lorry.server.rpc import health
from lorry.server.rpc.adapter_service import AdapterService
from lorry.server.rpc.control_service import ControlService
from lorry.server.rpc.generation_service import GenerationService
from lorry.server.rpc.interceptors import CallInterceptor
from lorry.v1 import adapter_pb2, adapter_pb2_grpc, control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc

_FILES = (generation_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR, control_pb2.DESCRIPTOR)
_DESCRIPTORS = [service for file in _FILES for service in file.services_by_name.values()]
SERVICES = tuple(service.full_name for service in _DESCRIPTORS)
REFLECTION = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)
METHODS = frozenset(
    [f"/{service.full_name}/{method.name}" for service in _DESCRIPTORS for method in service.methods]
    + [f"/{health.SERVICE_NAME}/{method}" for method in ("Check", "List", "Watch")]
    + [f"/{name}/ServerReflectionInfo" for name in REFLECTION]
)
"""Full names of all methods; the values that the label `method` of the metrics may have."""

WATCHERS = 1024
"""Calls beside generation that may be open at once: watches of health and adapters, control."""


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """The transport: message sizes both ways, one listener a port, lost peers found in half a minute."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


@dataclass(frozen=True)
class RunningServer:
    """A server that listens; `port` is the TCP port that it got."""

    port: int
    _server: grpc.aio.Server
    _health: health.HealthService
    _adapters: AdapterService
    _state: asyncio.Task[None]

    async def stop(self, grace: float = 5.0) -> None:
        """Take no more calls, end the watches, give other calls `grace` seconds, then cancel them."""
        self._state.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._state
        self._health.close()
        self._adapters.close()
        await self._server.stop(grace)

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await self._server.wait_for_termination()


def _reflection(names: tuple[str, ...]) -> grpc.GenericRpcHandler:
    """Reflection under the name of its first version too: the messages are the same but for their package."""
    servicer: Any = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(REFLECTION[0], {"ServerReflectionInfo": method})


async def _follow(frontend: Frontend, service: health.HealthService) -> None:
    """Health is SERVING exactly while the frontend serves."""
    async for state in frontend.watch_state():
        service.set_serving(state is State.SERVING)


async def serve(frontend: Frontend, config: ServerConfig) -> RunningServer:
    """Listen on `config.host:config.port` and serve `frontend`; raises OSError when the port is taken."""
    names = (*SERVICES, health.SERVICE_NAME, *REFLECTION)
    frontend.metrics.allow_grpc_methods(METHODS)
    server = grpc.aio.server(
        interceptors=[CallInterceptor(frontend.metrics.grpc_finished)],
        options=channel_options(config.max_message_bytes),
        maximum_concurrent_rpcs=config.engine.max_running + config.engine.max_waiting + WATCHERS,
    )
    health_service, adapter_service = health.HealthService(SERVICES), AdapterService(frontend)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(frontend), server)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapter_service, server)
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(frontend, names, config.max_message_bytes), server
    )
    server.add_generic_rpc_handlers((health_service.handler(), _reflection(names)))
    reflection.enable_server_reflection(names, server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.port}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{config.port}; is the port taken?") from error
    await server.start()
    state = asyncio.create_task(_follow(frontend, health_service))
    return RunningServer(port, server, health_service, adapter_service, state)
