"""AdapterService: the adapters that the server knows, while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lorry.server.frontend.interface import AdapterChange, Frontend
from lorry.server.rpc import convert, fields, render
from lorry.v1 import adapter_pb2, adapter_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """`close` ends the watches, which would else outlive the requests that a stopping server waits for."""

    def __init__(self, frontend: Frontend) -> None:
        self._adapters = frontend.adapters
        self._closed = asyncio.Event()

    def close(self) -> None:
        self._closed.set()

    async def LoadAdapter(
        self, request: adapter_pb2.LoadAdapterRequest, context: _Context
    ) -> adapter_pb2.LoadAdapterResponse:
        adapter_id, path, expected_revision = convert.load_adapter(request)
        info = await self._adapters.load(
            adapter_id,
            path,
            expected_revision=expected_revision,
            pin=request.pin,
            replace=request.replace,
        )
        return adapter_pb2.LoadAdapterResponse(adapter=render.adapter(info))

    async def UnloadAdapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context: _Context
    ) -> adapter_pb2.UnloadAdapterResponse:
        info = await self._adapters.unload(fields.adapter_id("id", request.id))
        return adapter_pb2.UnloadAdapterResponse(adapter=render.adapter(info))

    async def UpdateAdapter(
        self, request: adapter_pb2.UpdateAdapterRequest, context: _Context
    ) -> adapter_pb2.UpdateAdapterResponse:
        info = await self._adapters.pin(*convert.update_adapter(request))
        return adapter_pb2.UpdateAdapterResponse(adapter=render.adapter(info))

    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: _Context
    ) -> adapter_pb2.GetAdapterResponse:
        info = await self._adapters.get(fields.adapter_id("id", request.id))
        return adapter_pb2.GetAdapterResponse(adapter=render.adapter(info))

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: _Context
    ) -> adapter_pb2.ListAdaptersResponse:
        size, after = convert.page(request)
        found = await self._adapters.list(after, size + 1)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[render.adapter(info) for info in found[:size]],
            next_page_token=found[size - 1].id if len(found) > size else "",
        )

    async def WatchAdapters(
        self, request: adapter_pb2.WatchAdaptersRequest, context: _Context
    ) -> AsyncIterator[adapter_pb2.WatchAdaptersResponse]:
        changes = self._adapters.watch(convert.watch(request))
        closed = asyncio.ensure_future(self._closed.wait())
        coming: asyncio.Future[AdapterChange] | None = None
        try:
            while not self._closed.is_set():
                coming = coming or asyncio.ensure_future(anext(changes))
                await asyncio.wait((coming, closed), return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    change, coming = coming.result(), None
                    yield render.adapter_change(change)
        finally:
            closed.cancel()
            if coming is not None:
                coming.cancel()
                await asyncio.wait((coming,))
            close = getattr(changes, "aclose", None)
            if close is not None:
                await close()
