"""What surrounds every call: refusal of what cannot be read, errors as statuses, counting, one log line.

Services below raise domain errors and yield answers; no service touches a status code.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from lorry.server.errors import InvalidField
from lorry.server.rpc.errors import status_for
from lorry.server.rpc.fields import refuse_unknown

_log = logging.getLogger(__name__)

Count = Callable[[str, str], None]
"""Called once for each call that ended, with the full method name and the name of the status code."""


class Unreadable:
    """Stands for a request whose bytes are no message of its type."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler; the methods that nobody serves are counted as grpc answers them, UNIMPLEMENTED."""

    def __init__(self, count: Count) -> None:
        self._count = count

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            self._count(method, "UNIMPLEMENTED")
            return None
        deserializer = _forgiving(handler.request_deserializer)
        serializer = handler.response_serializer
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(method, handler.stream_stream), deserializer, serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, handler.unary_stream), deserializer, serializer
            )
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), deserializer, serializer)

    def _unary(self, method: str, behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async def answer() -> Any:
                _check(request)
                return await behavior(request, context)

            return await self._surround(method, context, answer)

        return call

    def _streaming(self, method: str, behavior: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async def answer() -> None:
                _check(request)
                responses = behavior(request, context)
                if inspect.isawaitable(responses):
                    await responses
                    return
                try:
                    async for response in responses:
                        await _write(context, response)
                finally:
                    # A call cancelled inside `write` leaves the generator suspended; its own `finally` frees
                    # the request in the engine, so it runs now and not when the garbage collector comes by.
                    await responses.aclose()

            await self._surround(method, context, answer)

        return call

    async def _surround(
        self,
        method: str,
        context: grpc.aio.ServicerContext[Any, Any],
        answer: Callable[[], Awaitable[Any]],
    ) -> Any:
        began, code = time.monotonic(), grpc.StatusCode.OK
        try:
            return await answer()
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            expired = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            status: Any = rpc_status.to_status(status_for(method, error))
            code = status.code
            await context.abort(status.code, status.details, status.trailing_metadata)
        finally:
            self._count(method, code.name)
            _log.debug("%s %s in %.1f ms", method, code.name, (time.monotonic() - began) * 1e3)


async def _write(context: grpc.aio.ServicerContext[Any, Any], response: Any) -> None:
    """Await the transport's taking of `response`; CancelledError when there is nobody to take it any more."""
    try:
        await context.write(response)
    except Exception as error:
        raise asyncio.CancelledError("the client is gone") from error


def _forgiving(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`deserialize`, but with `Unreadable` where grpc would answer INTERNAL to a client's own mistake."""

    def forgiving(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Unreadable()

    return forgiving


def _check(request: Any) -> None:
    if isinstance(request, Unreadable):
        raise InvalidField("the request's bytes are no message of its type", field="")
    if isinstance(request, Message):
        refuse_unknown(request)
