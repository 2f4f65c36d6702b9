"""ControlService: the server itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

import lorry
from lorry.server.frontend.interface import Frontend
from lorry.server.rpc import convert, fields, render
from lorry.v1 import control_pb2, control_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """`services`: full names of what is served; `max_message_bytes`: the largest message that is taken."""

    def __init__(self, frontend: Frontend, services: Sequence[str], max_message_bytes: int) -> None:
        self._frontend = frontend
        self._services = services
        self._max_message_bytes = max_message_bytes

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: _Context
    ) -> control_pb2.GetServerInfoResponse:
        start_time = Timestamp()
        start_time.FromNanoseconds(int(self._frontend.start_time * 1e9))
        return control_pb2.GetServerInfoResponse(
            version=lorry.__version__,
            state=control_pb2.ServerState.Name(self._frontend.state),
            start_time=start_time,
            services=self._services,
            max_message_bytes=self._max_message_bytes,
        )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, context: _Context
    ) -> control_pb2.GetModelInfoResponse:
        return render.model_info(self._frontend.model_info)

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: _Context) -> control_pb2.GetLoadResponse:
        return render.load(self._frontend.load())

    async def AbortRequest(
        self, request: control_pb2.AbortRequestRequest, context: _Context
    ) -> control_pb2.AbortRequestResponse:
        request_id = fields.request_id("request_id", request.request_id)
        return control_pb2.AbortRequestResponse(found=self._frontend.abort(request_id))

    async def Drain(self, request: control_pb2.DrainRequest, context: _Context) -> control_pb2.DrainResponse:
        return control_pb2.DrainResponse(in_flight=self._frontend.drain(convert.drain(request)))
