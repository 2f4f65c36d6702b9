"""The server as it is run, over a real channel: adapters that come and go, more of them than fit, death and drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import save_file

from lorry.v1 import adapter_pb2, adapter_pb2_grpc, control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PROMPT = [17, 23, 5, 91, 202, 44, 310, 68]
CONTEXT = 4096
LAYERS, HIDDEN, INTERMEDIATE, KEYS = 3, 128, 192, 64  # of the tiny model
TARGETS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
RANK = 56
PAGES = 4  # of 16 ranks
ADAPTER_PAGES = LAYERS * len(TARGETS) * PAGES
ADAPTER_BYTES = LAYERS * PAGES * 16 * 2 * sum(k + n for k, n in TARGETS.values())  # bfloat16


def write_adapter(folder, seed, rank=RANK):
    """A PEFT folder with random weights that change the answers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in TARGETS.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).half() * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).half() * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({module.split(".")[1] for module in TARGETS})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Server:
    """A server process and where it listens."""

    def __init__(self, process, line):
        self.process, self.line = process, line
        self.address = re.search(r" on (\S+)", line)[1]
        self.page = re.search(r"metrics on (\S+)", line)[1]

    def engine_pid(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = (int(pid) for pid in children if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes())
        return pid

    def metrics(self):
        with urllib.request.urlopen(self.page, timeout=60) as page:
            lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}


@contextlib.contextmanager
def serve(model, adapters, *options):
    command = [sys.executable, "-m", "lorry.server.cli", "serve", "--port", "0", "--metrics-port", "0"]
    command += ["--adapters", str(adapters), "--model", str(model), "--kv-memory", "64MiB", "--threads", "1"]
    command += ["--log-level", "warning", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), f"the server exited with {process.wait(10)}"
        yield Server(process, line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for number in range(12):
        write_adapter(root / "known" / f"adapter-{number}", number)
    for version in (1, 2):
        write_adapter(root / "more" / f"version-{version}", 100 + version)
    return root


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model with room for streams that take a while."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(model, folders):
    """One whose pool holds 4 of the adapters, and not 5."""
    options = ["--adapter-root", str(folders / "more"), "--adapter-memory", str(int(4.5 * ADAPTER_BYTES))]
    with serve(model, folders / "known", *options) as running:
        yield running


class Client:
    """The stubs on one channel, and whole answers from streams."""

    def __init__(self, channel):
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.control = control_pb2_grpc.ControlServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def stream(self, *adapters, tokens=12, prompt=PROMPT, **fields):
        spec = generation_pb2.GenerationSpec(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            adapters=[generation_pb2.AdapterRef(id=id) for id in adapters],
            sampling=generation_pb2.SamplingParams(temperature=0),
            stopping=generation_pb2.StoppingCriteria(max_new_tokens=tokens, ignore_eos=True),
            **fields,
        )
        return self.generation.GenerateStream(generation_pb2.GenerateStreamRequest(spec=spec))

    async def tokens(self, *adapters, **fields):
        return (await follow(self.stream(*adapters, **fields))).token_ids

    async def load_adapter(self, id, path, **fields):
        answer = await self.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(id=id, path=path, **fields))
        return answer.adapter

    async def status(self):
        return (await self.health.Check(health_pb2.HealthCheckRequest())).status


class Answer:
    """What a stream brought, and the longest wait for the next token."""

    def __init__(self):
        self.token_ids, self.revision, self.reason, self.longest_wait = [], None, None, 0.0
        self.begun = asyncio.Event()


async def follow(stream, answer=None):
    answer = answer or Answer()
    last = None
    async for event in stream:
        match event.WhichOneof("event"):
            case "started":
                answer.revision = event.started.adapters[0].revision if event.started.adapters else None
            case "delta":
                answer.token_ids += event.delta.token_ids
                now = time.monotonic()
                answer.longest_wait = max(answer.longest_wait, now - (last or now))
                last = now
                answer.begun.set()
            case "finished":
                answer.reason = event.finished.reason
    return answer


@pytest.fixture
async def client(server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Client(channel)


async def settled(server, **counts):
    """The metrics when nothing runs or waits, the counters of `counts` have their values, and the engine, which tells
    of its own numbers a few times a second, has told of every request that got tokens."""
    for _ in range(600):
        metrics = await asyncio.to_thread(server.metrics)
        idle = metrics["lorry_requests_running"] == metrics["lorry_requests_waiting"] == 0
        told = metrics["lorry_request_queue_seconds_count"] >= metrics["lorry_time_to_first_token_seconds_count"]
        if idle and told and all(metrics[name] == value for name, value in counts.items()):
            return metrics
        await asyncio.sleep(0.1)
    raise AssertionError(f"not settled: {metrics}")


async def test_64_streams_of_12_adapters_share_a_pool_that_holds_4(client, server):
    names = [f"adapter-{number}" for number in range(12)]
    alone = {name: await client.tokens(name) for name in names}
    assert len({tuple(tokens) for tokens in alone.values()}) == 12
    before = await settled(server)
    chosen = [names[(7 * number) % 12] for number in range(64)]
    together = await asyncio.gather(*(client.tokens(name) for name in chosen))
    assert together == [alone[name] for name in chosen]
    after = await settled(server)
    load = await client.control.GetLoad(control_pb2.GetLoadRequest())
    assert 4 * ADAPTER_PAGES <= load.adapter_pages_total < 5 * ADAPTER_PAGES
    assert load.adapter_pages_used <= load.adapter_pages_total
    assert load.adapters_loaded <= 4
    evicted = "lorry_adapter_evictions_total"
    assert after[evicted] - before[evicted] >= 12 - 4


async def test_adapters_are_loaded_replaced_and_unloaded_while_streams_run(client):
    old = await client.load_adapter("hot", "version-1")
    old_tokens, base_tokens = await asyncio.gather(client.tokens("hot", tokens=1600), client.tokens(tokens=1600))

    base, hot = Answer(), Answer()
    running = [
        asyncio.create_task(follow(client.stream(tokens=1600), base)),
        asyncio.create_task(follow(client.stream("hot", tokens=1600), hot)),
    ]
    await asyncio.gather(base.begun.wait(), hot.begun.wait())
    with pytest.raises(grpc.aio.AioRpcError) as taken:
        await client.load_adapter("hot", "version-2")
    assert taken.value.code() is grpc.StatusCode.ALREADY_EXISTS
    new = await client.load_adapter("hot", "version-2", replace=True)
    assert new.revision != old.revision
    fresh = await follow(client.stream("hot"))
    assert fresh.revision == new.revision
    assert fresh.token_ids != old_tokens[:12]
    unloaded = await client.adapters.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(id="hot"))
    assert unloaded.adapter.id == "hot"
    assert not hot.reason, "the stream ended before its adapter was taken away: give it more tokens"
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await client.tokens("hot")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    await asyncio.gather(*running)
    assert hot.revision == old.revision
    assert hot.token_ids == old_tokens
    assert base.token_ids == base_tokens
    assert max(base.longest_wait, hot.longest_wait) < 10.0
    listed = await client.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
    assert [adapter.id for adapter in listed.adapters] == sorted(f"adapter-{number}" for number in range(12))


async def test_the_metrics_page_follows_the_traffic(client, server):
    before = await settled(server)
    await asyncio.gather(*(client.tokens(name, tokens=9) for name in ("adapter-3", "adapter-5")))
    stream = client.stream(tokens=3000)
    await stream.read()
    await stream.read()
    stream.cancel()
    queued = "lorry_request_queue_seconds_count"
    after = await settled(server, **{queued: before[queued] + 3})
    gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert gained['lorry_requests_finished_total{reason="length"}'] == 2
    assert gained['lorry_requests_finished_total{reason="cancelled"}'] == 1
    assert gained["lorry_prompt_tokens_total"] == 3 * len(PROMPT)
    assert gained["lorry_generation_tokens_total"] >= 2 * 9 + 1
    assert gained["lorry_time_to_first_token_seconds_count"] == 3
    assert gained["lorry_inter_token_latency_seconds_count"] >= 2 * 8
    assert gained["lorry_e2e_request_latency_seconds_count"] == 2
    method = "/lorry.v1.GenerationService/GenerateStream"
    assert gained[f'lorry_grpc_requests_total{{code="OK",method="{method}"}}'] == 2
    assert gained[f'lorry_grpc_requests_total{{code="CANCELLED",method="{method}"}}'] == 1
    assert after["lorry_engine_up"] == 1
    assert after['lorry_adapter_loads_total{result="ok"}'] >= 14
    assert after["lorry_adapter_load_seconds_count"] >= 14
    assert 0 < after["lorry_adapter_pages_used"] <= after["lorry_adapter_pages_total"]
    assert sum(name.startswith("lorry_build_info{") for name in after) == 1


async def test_a_killed_engine_is_seen_at_once_and_replaced(client, server):
    before = await client.tokens("adapter-1")
    await client.load_adapter("kept", "version-1")
    watch = aiter(client.health.Watch(health_pb2.HealthCheckRequest()))
    assert (await anext(watch)).status == SERVING
    answers = [Answer() for _ in range(5)]
    calls = [asyncio.create_task(follow(client.stream(tokens=3000), answer)) for answer in answers]
    await asyncio.gather(*(answer.begun.wait() for answer in answers))
    os.kill(server.engine_pid(), signal.SIGKILL)
    for failed in await asyncio.gather(*calls, return_exceptions=True):
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
    assert (await anext(watch)).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.tokens()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await asyncio.to_thread(server.metrics))["lorry_engine_up"] == 0
    assert (await asyncio.wait_for(anext(watch), 120)).status == SERVING
    assert await client.tokens("adapter-1") == before
    assert await client.tokens("kept")
    assert (await asyncio.to_thread(server.metrics))["lorry_engine_up"] == 1


async def test_sigterm_lets_streams_finish_and_exits_with_0(model, folders):
    with serve(model, folders / "known", "--drain-timeout", "60") as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            client = Client(channel)
            watch = aiter(client.health.Watch(health_pb2.HealthCheckRequest()))
            assert (await anext(watch)).status == SERVING
            answers = [Answer() for _ in range(3)]
            names = ((), ("adapter-2",), ("adapter-7",))
            calls = [
                asyncio.create_task(follow(client.stream(*name, tokens=300), answer))
                for name, answer in zip(names, answers, strict=True)
            ]
            await asyncio.gather(*(answer.begun.wait() for answer in answers))
            server.process.send_signal(signal.SIGTERM)
            assert (await anext(watch)).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.tokens()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            for answer in await asyncio.gather(*calls):
                assert answer.reason == generation_pb2.FINISH_REASON_LENGTH
                assert len(answer.token_ids) == 300
        assert await asyncio.to_thread(server.process.wait, 60) == 0
