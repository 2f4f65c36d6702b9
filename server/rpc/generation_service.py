"""GenerationService: text, scores and tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lorry.server.errors import InvalidField
from lorry.server.frontend.interface import Frontend, RequestHandle
from lorry.server.rpc import convert, render
from lorry.v1 import generation_pb2, generation_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


def deadline_of(context: _Context) -> float | None:
    """time.time() after which the caller does not wait any more; None: it waits for ever."""
    remaining = context.time_remaining()
    return None if remaining is None else time.time() + remaining


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """A call that ends early, by cancellation, a lost client or its deadline, closes its request's handle.

    Backpressure: a stream awaits the write of one event before it takes the next; what comes meanwhile is
    joined by the handle, so that a reader that stalls costs one delta for each sequence.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def _submit(
        self,
        message: generation_pb2.GenerateRequest | generation_pb2.GenerateStreamRequest,
        context: _Context,
    ) -> RequestHandle:
        vocab_size = self._frontend.model_info.vocab_size
        present, deadline = message.HasField("spec"), deadline_of(context)
        request = convert.generation(message.spec, present, vocab_size, deadline)
        try:
            return await self._frontend.submit(request)
        except InvalidField as error:
            path = f"spec.{error.fields.pop('field', '')}"
            raise InvalidField(error.message, field=path, **error.fields) from None

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: _Context
    ) -> generation_pb2.GenerateResponse:
        async with await self._submit(request, context) as handle:
            return await render.collect(aiter(handle))

    async def GenerateStream(
        self, request: generation_pb2.GenerateStreamRequest, context: _Context
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        async with await self._submit(request, context) as handle:
            async for event in handle:
                yield render.event(event)

    async def Score(self, request: generation_pb2.ScoreRequest, context: _Context) -> generation_pb2.ScoreResponse:
        vocab_size = self._frontend.model_info.vocab_size
        prompt, continuation, adapters = convert.score(request, vocab_size)
        score = await self._frontend.score(
            prompt, continuation, adapters=adapters, entropy=request.entropy, deadline=deadline_of(context)
        )
        return generation_pb2.ScoreResponse(
            logprobs=score.logprobs, greedy_token_ids=score.greedy_token_ids, entropies=score.entropies
        )

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: _Context
    ) -> generation_pb2.TokenizeResponse:
        prompt, special = convert.tokenize(request)
        token_ids = await self._frontend.tokenize(prompt, add_special_tokens=special)
        return generation_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: _Context
    ) -> generation_pb2.DetokenizeResponse:
        token_ids, skip = convert.detokenize(request, self._frontend.model_info.vocab_size)
        text = await self._frontend.detokenize(token_ids, skip_special_tokens=skip)
        return generation_pb2.DetokenizeResponse(text=text)
