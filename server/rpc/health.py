"""`grpc.health.v1`: Check, List and Watch over one state for all services.

The stock asyncio servicer loses watchers when one leaves, so this is our own. A watcher holds no queue: it
remembers the status that it sent last and looks again whenever the state changes, so that any number of
watchers come and go, and a slow one misses moments between but never the last one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2

from lorry.server.errors import NotFound

SERVICE_NAME = "grpc.health.v1.Health"


def _messages() -> dict[str, Any]:
    """The message classes of the health protocol, by name.

    The oldest admitted runtime lacks List. Its two messages are added to a copy of the file in a pool of our
    own, so that the classes of the stock package, which a client in this process may use, stay as they are.
    """
    file = descriptor_pb2.FileDescriptorProto()
    health_pb2.DESCRIPTOR.CopyToProto(file)
    if all(message.name != "HealthListResponse" for message in file.message_type):
        field = descriptor_pb2.FieldDescriptorProto
        file.message_type.add(name="HealthListRequest")
        response = file.message_type.add(name="HealthListResponse")
        entry = response.nested_type.add(name="StatusesEntry", options={"map_entry": True})
        entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
        entry.field.add(
            name="value",
            number=2,
            type=field.TYPE_MESSAGE,
            type_name=".grpc.health.v1.HealthCheckResponse",
            label=field.LABEL_OPTIONAL,
        )
        response.field.add(
            name="statuses",
            number=1,
            type=field.TYPE_MESSAGE,
            type_name=".grpc.health.v1.HealthListResponse.StatusesEntry",
            label=field.LABEL_REPEATED,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    found = {name: pool.FindMessageTypeByName(f"grpc.health.v1.{name}") for name in names}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


MESSAGES = _messages()
_Request, _Response = MESSAGES["HealthCheckRequest"], MESSAGES["HealthCheckResponse"]
_ListRequest, _ListResponse = MESSAGES["HealthListRequest"], MESSAGES["HealthListResponse"]


class HealthService:
    """Health of the whole server ("") and of each service by its full name; all have the same status.

    `set_serving` and `close` are called from the event loop that serves. After `close` watchers get a last
    NOT_SERVING and their streams end, so that a stopping server does not wait for them.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset({"", *services})
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        if serving != self._serving and not self._closed:
            self._serving = serving
            self._wake()

    def close(self) -> None:
        self._serving, self._closed = False, True
        self._wake()

    def _wake(self) -> None:
        """Everyone who waits holds the old event, which is now set; the next wait is on a fresh one."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if self._serving else _Response.NOT_SERVING)

    async def Check(self, request: Any, context: object) -> Any:
        """The status of `request.service`; NotFound for a service that is not served."""
        if request.service not in self._services:
            raise NotFound(
                f"no service {request.service[:256]!r} here",
                resource_type="service",
                resource_name=request.service[:256],
            )
        return self._status(request.service)

    async def List(self, request: Any, context: object) -> Any:
        """The status of every service."""
        return _ListResponse(statuses={name: self._status(name) for name in self._services})

    async def Watch(self, request: Any, context: object) -> AsyncIterator[Any]:
        """The status of `request.service` now and after every change; SERVICE_UNKNOWN for one not served."""
        sent = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != sent:
                yield status
                sent = status
            if self._closed:
                return
            if changed is self._changed:
                await changed.wait()

    def handler(self) -> grpc.GenericRpcHandler:
        """What `grpc.Server.add_generic_rpc_handlers` takes."""
        serialize = _Response.SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self.Check, _Request.FromString, serialize),
                "List": grpc.unary_unary_rpc_method_handler(
                    self.List, _ListRequest.FromString, _ListResponse.SerializeToString
                ),
                "Watch": grpc.unary_stream_rpc_method_handler(self.Watch, _Request.FromString, serialize),
            },
        )
