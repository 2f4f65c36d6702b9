"""The services through a real channel, above a frontend without an engine."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from lorry.server import errors
from lorry.server.frontend.interface import AdapterChange, ChangeKind, State
from lorry.server.frontend.request import ChatMessage, ChatPrompt, Delta, TextPrompt, TokenPrompt
from lorry.server.rpc import server as rpc_server
from lorry.v1 import adapter_pb2 as ad
from lorry.v1 import adapter_pb2_grpc, control_pb2_grpc, generation_pb2_grpc
from lorry.v1 import control_pb2 as ct
from lorry.v1 import generation_pb2 as gn


@pytest.fixture
def generation(channel: grpc.aio.Channel) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture
def adapters(channel: grpc.aio.Channel) -> Any:
    return adapter_pb2_grpc.AdapterServiceStub(channel)


@pytest.fixture
def control(channel: grpc.aio.Channel) -> Any:
    return control_pb2_grpc.ControlServiceStub(channel)


def stream_request(**fields: Any) -> gn.GenerateStreamRequest:
    return gn.GenerateStreamRequest(spec=gn.GenerationSpec(text="hello", **fields))


async def test_stream_renders_every_event(frontend: Any, generation: Any, helpers: Any) -> None:
    call = generation.GenerateStream(stream_request(request_id="mine"))
    handle = await frontend.handles.get()
    handle.put(*helpers.events_of(handle.request), None)
    answers = [answer async for answer in call]
    assert [answer.WhichOneof("event") for answer in answers] == [
        "started",
        "prompt_logprobs",
        "delta",
        "delta",
        "finished",
        "delta",
        "finished",
    ]
    started = answers[0].started
    assert (started.request_id, started.prompt_tokens, started.cached_tokens) == ("mine", 5, 3)
    assert started.adapters[0] == gn.AdapterRef(id="pirate", weight=-0.5, revision=helpers.REVISION)
    top = answers[1].prompt_logprobs.logprobs[0]
    assert (top.token_id, top.logprob, top.rank) == (9, -0.25, 2)
    assert [(rival.token_id, rival.logprob) for rival in top.top] == [(8, -0.125), (9, -0.25)]
    assert answers[2].delta.index == 1
    assert list(answers[2].delta.logprobs) == [top]
    finished = answers[4].finished
    assert (finished.index, finished.reason, finished.stop) == (1, gn.FINISH_REASON_STOP, "end")
    assert finished.usage == gn.Usage(prompt_tokens=5, cached_tokens=3, completion_tokens=2)
    assert answers[6].finished.timings.decode == Duration(seconds=2, nanos=1)
    assert handle.closed.is_set()


async def test_unary_collects_the_stream(frontend: Any, generation: Any, helpers: Any) -> None:
    call = asyncio.ensure_future(generation.Generate(gn.GenerateRequest(spec=gn.GenerationSpec(text="hello"))))
    handle = await frontend.handles.get()
    handle.put(*helpers.events_of(handle.request), None)
    answer = await call
    assert answer.request_id == handle.request_id
    assert answer.request_id.startswith("req-")
    assert [(c.index, c.text, list(c.token_ids)) for c in answer.completions] == [
        (0, "aä", [10, 11]),
        (1, "b", [9]),
    ]
    assert [len(c.logprobs) for c in answer.completions] == [0, 1]
    assert [c.reason for c in answer.completions] == [gn.FINISH_REASON_LENGTH, gn.FINISH_REASON_STOP]
    assert answer.usage == gn.Usage(prompt_tokens=5, cached_tokens=3, completion_tokens=4)
    assert answer.timings.prefill == Duration(seconds=1, nanos=500_000_000)
    assert len(answer.prompt_logprobs) == 2
    assert answer.adapters[0].id == "pirate"
    assert handle.closed.is_set()


async def test_deadline_reaches_the_request(frontend: Any, generation: Any) -> None:
    call = generation.GenerateStream(stream_request(), timeout=60)
    handle = await frontend.handles.get()
    assert 50 < handle.request.deadline - time.time() <= 60
    assert abs(handle.request.arrival - time.time()) < 10
    call.cancel()
    without = generation.GenerateStream(stream_request())
    handle = await frontend.handles.get()
    assert handle.request.deadline is None
    without.cancel()


@pytest.mark.parametrize("events", [0, 1, 3])
async def test_cancel_closes_the_handle(frontend: Any, generation: Any, helpers: Any, events: int) -> None:
    call = generation.GenerateStream(stream_request())
    handle = await frontend.handles.get()
    handle.put(*helpers.events_of(handle.request)[:events])
    for _ in range(events):
        await call.read()
    call.cancel()
    await asyncio.wait_for(handle.closed.wait(), 60)


async def test_lost_client_closes_the_handle(frontend: Any, server: Any) -> None:
    lost = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
    call = generation_pb2_grpc.GenerationServiceStub(lost).Generate(
        gn.GenerateRequest(spec=gn.GenerationSpec(text="x"))
    )
    handle = await frontend.handles.get()
    await lost.close()
    await asyncio.wait_for(handle.closed.wait(), 60)
    assert call.done()


async def test_deadline_closes_the_handle_and_is_counted(frontend: Any, generation: Any, helpers: Any) -> None:
    await generation.Tokenize(gn.TokenizeRequest(text="x"))  # the channel is open before the time runs
    call = generation.GenerateStream(stream_request(), timeout=0.5)
    handle = await asyncio.wait_for(frontend.handles.get(), 60)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(handle.closed.wait(), 60)
    counted = 'code="DEADLINE_EXCEEDED",method="/lorry.v1.GenerationService/GenerateStream"} 1.0'
    await helpers.soon(lambda: counted in frontend.metrics.page().decode())


async def test_a_cancelled_call_is_counted(frontend: Any, generation: Any, helpers: Any) -> None:
    call = generation.GenerateStream(stream_request())
    await frontend.handles.get()
    call.cancel()
    counted = 'code="CANCELLED",method="/lorry.v1.GenerationService/GenerateStream"} 1.0'
    await helpers.soon(lambda: counted in frontend.metrics.page().decode())


async def test_stalled_reader_holds_back_the_stream(frontend: Any, generation: Any, helpers: Any) -> None:
    """Once the transport's window (some MB) is full, events stay with the handle, which joins them."""
    call = generation.GenerateStream(stream_request())
    handle = await frontend.handles.get()
    piece = Delta(0, "x" * 100_000, (1,))
    handle.put(*[piece] * 500)
    assert await helpers.settled(handle.queue) > 300
    call.cancel()
    await asyncio.wait_for(handle.closed.wait(), 60)


async def test_cancel_while_a_write_is_held_back_closes_the_handle(
    frontend: Any, generation: Any, helpers: Any
) -> None:
    call = generation.GenerateStream(stream_request())
    handle = await frontend.handles.get()
    handle.put(*(Delta(0, "x" * 200_000, (1,)) for _ in range(50)))
    assert await helpers.settled(handle.queue) > 0
    assert not handle.closed.is_set()
    call.cancel()
    await asyncio.wait_for(handle.closed.wait(), 60)


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    found = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


async def test_refusal_at_submit_and_in_the_stream(frontend: Any, generation: Any, helpers: Any) -> None:
    frontend.refusal = errors.QueueFull("64 requests wait already", waiting=64)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.GenerateStream(stream_request()).read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value)["RetryInfo"].retry_delay.seconds >= 1
    frontend.refusal = None
    call = generation.GenerateStream(stream_request())
    handle = await frontend.handles.get()
    handle.put(
        helpers.events_of(handle.request)[0],
        errors.NotFound("no adapter 'x'", resource_type="adapter", resource_name="x"),
    )
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert details_of(caught.value)["ResourceInfo"].resource_name == "x"
    assert handle.closed.is_set()


@pytest.mark.parametrize("bug", [RuntimeError("/secret/path"), errors.LorryError("/secret/path")])
async def test_bug_is_opaque(frontend: Any, generation: Any, bug: Exception, caplog: Any) -> None:
    frontend.refusal = bug
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.Generate(gn.GenerateRequest(spec=gn.GenerationSpec(text="x")))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details()) + str(details_of(caught.value))
    bug_id = details_of(caught.value)["ErrorInfo"].metadata["error_id"]
    assert bug_id in str(caught.value.details())
    assert bug_id in caplog.text
    assert "/secret/path" in caplog.text


async def test_bad_field_names_its_path(generation: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.Generate(
            gn.GenerateRequest(spec=gn.GenerationSpec(text="x", sampling=gn.SamplingParams(top_p=1.5)))
        )
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    violation = details_of(caught.value)["BadRequest"].field_violations[0]
    assert violation.field == "spec.sampling.top_p"
    assert "1.5" in violation.description
    assert "above 0, to 1" in violation.description


async def test_what_the_frontend_refuses_is_below_spec(frontend: Any, generation: Any) -> None:
    frontend.refusal = errors.InvalidField("the prompt has no tokens", field="prompt")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.Generate(gn.GenerateRequest(spec=gn.GenerationSpec(text="x")))
    assert details_of(caught.value)["BadRequest"].field_violations[0].field == "spec.prompt"


async def test_unreadable_bytes_and_unknown_fields_are_refused(channel: grpc.aio.Channel) -> None:
    raw = channel.unary_unary("/lorry.v1.GenerationService/Generate")
    unknown_inside = gn.GenerateRequest(spec=gn.GenerationSpec(text="x")).SerializeToString()
    tail = gn.GenerationSpec(text="x").SerializeToString() + b"\xf8\x07\x01"  # field 127, varint
    for data, words in (
        (b"\xff\xff\xff", "no message"),
        (unknown_inside + b"\xf8\x07\x01", "number 127"),
        (b"\x0a" + bytes([len(tail)]) + tail, "spec has a field of number 127"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(data)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(caught.value.details())


async def test_message_size_is_limited(generation: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.Tokenize(gn.TokenizeRequest(text="x" * (1 << 21)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_are_counted(frontend: Any, channel: grpc.aio.Channel, generation: Any, helpers: Any) -> None:
    await generation.Tokenize(gn.TokenizeRequest(text="x"))
    with pytest.raises(grpc.aio.AioRpcError):
        await generation.Tokenize(gn.TokenizeRequest())
    for name in ("/lorry.v1.GenerationService/Guess", "/no.such.Service/At.all"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(name)(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    tokenize = "/lorry.v1.GenerationService/Tokenize"
    for labels, calls in (
        (f'code="OK",method="{tokenize}"', 1),
        (f'code="INVALID_ARGUMENT",method="{tokenize}"', 1),
        ('code="UNIMPLEMENTED",method="other"', 2),
    ):
        line = f"lorry_grpc_requests_total{{{labels}}} {calls}.0"
        await helpers.soon(lambda line=line: line in frontend.metrics.page().decode())


async def test_score_tokenize_detokenize(frontend: Any, generation: Any) -> None:
    score = await generation.Score(
        gn.ScoreRequest(
            token_ids=gn.TokenIds(ids=[1, 2]),
            continuation=gn.TokenIds(ids=[3, 4]),
            adapters=[gn.AdapterRef(id="a")],
        )
    )
    assert list(score.logprobs) == [-0.5, -1.5]
    assert list(score.greedy_token_ids) == [3, 4]
    assert list(score.entropies) == []
    prompt, continuation, refs, deadline = frontend.scored
    assert (prompt, continuation, deadline) == (TokenPrompt((1, 2)), (3, 4), None)
    assert (refs[0].id, refs[0].weight, refs[0].revision) == ("a", 1.0, None)
    asking = gn.ScoreRequest(text="x", continuation=gn.TokenIds(ids=[3, 4]), entropy=True)
    assert list((await generation.Score(asking)).entropies) == [0.25, 0.75]
    tokens = await generation.Tokenize(gn.TokenizeRequest(text="", add_special_tokens=False))
    assert list(tokens.token_ids) == [5, 6, 7]
    assert frontend.tokenized == (TextPrompt(""), False)
    chat = gn.ChatPrompt(messages=[gn.ChatMessage(role="user", content="hi")], add_generation_prompt=False)
    await generation.Tokenize(gn.TokenizeRequest(chat=chat))
    assert frontend.tokenized == (ChatPrompt((ChatMessage("user", "hi"),), False), True)
    text = await generation.Detokenize(gn.DetokenizeRequest(token_ids=[8, 9]))
    assert text.text == "[8, 9] True"


async def test_adapters(frontend: Any, adapters: Any, helpers: Any) -> None:
    loaded = await adapters.LoadAdapter(
        ad.LoadAdapterRequest(id="p.1", path="sub/p", expected_revision=helpers.REVISION, pin=True, replace=True)
    )
    assert frontend.adapters.calls == [("load", "p.1", "sub/p", helpers.REVISION, True, True)]
    assert loaded.adapter == ad.Adapter(
        id="p.1",
        revision=helpers.REVISION,
        rank=40,
        target_modules=["q_proj", "v_proj"],
        state=ad.ADAPTER_STATE_DEVICE,
        pinned=True,
        bytes=4096,
        in_flight=3,
        methods=["rslora"],
    )
    unpinned = await adapters.UpdateAdapter(ad.UpdateAdapterRequest(id="p.1", pinned=False))
    assert not unpinned.adapter.pinned
    assert (await adapters.GetAdapter(ad.GetAdapterRequest(id="p.1"))).adapter == unpinned.adapter
    assert (await adapters.UnloadAdapter(ad.UnloadAdapterRequest(id="p.1"))).adapter.id == "p.1"
    for call in (
        adapters.GetAdapter(ad.GetAdapterRequest(id="p.1")),
        adapters.UnloadAdapter(ad.UnloadAdapterRequest(id="p.1")),
        adapters.UpdateAdapter(ad.UpdateAdapterRequest(id="p.1", pinned=True)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 1), (5, 2), (6, 3), (7, 7), (7, None)])
async def test_pages_hold_every_adapter_once(
    frontend: Any, adapters: Any, helpers: Any, count: int, size: int | None
) -> None:
    ids = sorted(f"a-{index}" for index in range(count))
    frontend.adapters.known = {id: helpers.adapter_info(id) for id in ids}
    found, token = [], ""
    for _ in range(count + 1):
        page = await adapters.ListAdapters(ad.ListAdaptersRequest(page_size=size, page_token=token))
        assert len(page.adapters) <= (size or 1000)
        found += [adapter.id for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert found == ids


async def test_watch_adapters(frontend: Any, adapters: Any, server: Any, helpers: Any) -> None:
    frontend.adapters.known = {id: helpers.adapter_info(id) for id in ("a", "b")}
    calls = [adapters.WatchAdapters(ad.WatchAdaptersRequest(ids=ids)) for ids in ([], ["b"], [])]
    first = [[(await call.read()).adapter.id for _ in range(n)] for call, n in zip(calls, (2, 1, 2), strict=True)]
    assert first == [["a", "b"], ["b"], ["a", "b"]]
    await helpers.soon(lambda: len(frontend.adapters.changes) == 3)
    calls[2].cancel()
    await helpers.soon(lambda: len(frontend.adapters.changes) == 2)
    for queue in frontend.adapters.changes:
        queue.put_nowait(AdapterChange(ChangeKind.REMOVED, helpers.adapter_info("b")))
    for call in calls[:2]:
        change = await call.read()
        assert (change.type, change.adapter.id) == (ad.ADAPTER_EVENT_TYPE_REMOVED, "b")
    await asyncio.wait_for(server.stop(600), 60)
    for call in calls[:2]:
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK
    assert frontend.adapters.changes == []


async def test_control(frontend: Any, control: Any) -> None:
    info = await control.GetServerInfo(ct.GetServerInfoRequest())
    assert info.version == importlib.import_module("lorry").__version__
    assert info.state == ct.SERVER_STATE_SERVING
    assert info.start_time.ToNanoseconds() == 1_234_500_000_000
    assert set(info.services) > {f"lorry.v1.{name}Service" for name in ("Generation", "Adapter", "Control")}
    assert info.max_message_bytes == 1 << 20
    model = await control.GetModelInfo(ct.GetModelInfoRequest())
    assert (model.name, model.vocab_size, list(model.eos_token_ids)) == ("tiny", 211, [2, 7])
    assert model.bits_per_linear_weight == 4.125
    assert (model.kernels, model.dtype, model.kv_dtype) == ("native", "float32", "bfloat16")
    assert model.base_fingerprint == "fedcba9876543210" * 4
    assert model.draft_model == "tinier"
    load = await control.GetLoad(ct.GetLoadRequest())
    assert [value for _, value in load.ListFields()] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for request_id, found in (("in-flight", True), ("gone", False)):
        answer = await control.AbortRequest(ct.AbortRequestRequest(request_id=request_id))
        assert answer.found is found
    for timeout, seconds in ((None, None), (Duration(seconds=2, nanos=500_000_000), 2.5), (Duration(), 0.0)):
        answer = await control.Drain(ct.DrainRequest(timeout=timeout))
        assert answer.in_flight == 11
        assert frontend.drain_timeouts.pop() == seconds


async def test_model_is_unavailable_while_it_loads(frontend: Any, control: Any, generation: Any) -> None:
    frontend.set_state(State.STARTING)
    assert (await control.GetServerInfo(ct.GetServerInfoRequest())).state == ct.SERVER_STATE_STARTING
    for call in (
        control.GetModelInfo(ct.GetModelInfoRequest()),
        generation.Generate(gn.GenerateRequest(spec=gn.GenerationSpec(text="x"))),
        generation.Detokenize(gn.DetokenizeRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services(channel: grpc.aio.Channel, version: str) -> None:
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    for symbol in ("lorry.v1.GenerationService", "grpc.health.v1.Health"):
        stream = call(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
                ]
            )
        )
        names = {service.name for service in (await stream.read()).list_services_response.service}
        assert symbol in names
        assert (await stream.read()).file_descriptor_response.file_descriptor_proto


async def test_port_is_not_shared(frontend: Any, server: Any) -> None:
    config = rpc_server.ServerConfig(port=server.port)
    with pytest.raises(OSError, match=str(server.port)):
        await rpc_server.serve(frontend, config)
