"""Health through a real channel: watchers come and go, and none is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorry.server.frontend.interface import State
from lorry.server.rpc.health import MESSAGES

Status = health_pb2.HealthCheckResponse.ServingStatus
SERVING, NOT_SERVING, UNKNOWN = Status.SERVING, Status.NOT_SERVING, Status.SERVICE_UNKNOWN
NAMES = ["", *(f"lorry.v1.{name}Service" for name in ("Generation", "Adapter", "Control"))]


@pytest.fixture
def health(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def read(watch: Any) -> int:
    return (await asyncio.wait_for(watch.read(), 60)).status


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.STARTING, NOT_SERVING),
        (State.SERVING, SERVING),
        (State.DRAINING, NOT_SERVING),
        (State.DOWN, NOT_SERVING),
    ],
)
async def test_check_and_list_follow_the_frontend(
    frontend: Any, health: Any, channel: grpc.aio.Channel, state: State, status: int
) -> None:
    frontend.set_state(state)
    watch = health.Watch(request())
    while await read(watch) != status:
        pass
    for name in NAMES:
        assert (await health.Check(request(name))).status == status
    listing = channel.unary_unary(
        "/grpc.health.v1.Health/List",
        MESSAGES["HealthListRequest"].SerializeToString,
        MESSAGES["HealthListResponse"].FromString,
    )
    statuses = (await listing(MESSAGES["HealthListRequest"]())).statuses
    assert {name: entry.status for name, entry in statuses.items()} == dict.fromkeys(NAMES, status)


async def test_unknown_service(health: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(request("no.such.Service"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert await read(health.Watch(request("no.such.Service"))) == UNKNOWN


async def test_watchers_come_and_go(frontend: Any, health: Any) -> None:
    """The stock asyncio servicer drops the others when one watcher leaves; here each sees every change."""
    watches = [health.Watch(request(NAMES[index % len(NAMES)])) for index in range(5)]
    for watch in watches:
        if await read(watch) == NOT_SERVING:
            assert await read(watch) == SERVING
    status = SERVING
    for leaver in (watches[1], watches[0], watches[4]):
        leaver.cancel()
        watches.remove(leaver)
        newcomer = health.Watch(request())
        assert await read(newcomer) == status
        watches.append(newcomer)
        status = NOT_SERVING if status == SERVING else SERVING
        frontend.set_state(State.SERVING if status == SERVING else State.DOWN)
        assert [await read(watch) for watch in watches] == [status] * len(watches)


async def test_unchanged_status_is_not_sent_again(frontend: Any, health: Any) -> None:
    watch = health.Watch(request())
    while await read(watch) != SERVING:
        pass
    frontend.set_state(State.DOWN)
    assert await read(watch) == NOT_SERVING
    for state in (State.STARTING, State.DRAINING):
        frontend.set_state(state)
        await asyncio.sleep(0.02)
    frontend.set_state(State.SERVING)
    assert await read(watch) == SERVING


async def test_stopping_ends_the_watches(health: Any, server: Any) -> None:
    watches = [health.Watch(request()) for _ in range(3)]
    for watch in watches:
        while await read(watch) != SERVING:
            pass
    stopping = asyncio.ensure_future(server.stop(600))
    for watch in watches:
        assert await read(watch) == NOT_SERVING
        assert await asyncio.wait_for(watch.read(), 60) is grpc.aio.EOF
    await asyncio.wait_for(stopping, 60)
