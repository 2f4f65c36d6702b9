"""Thousands of adapters on disk, and streams that ask for them: what `adapters.py` measures.

An adapter is a folder of its own with a config of its own (`lora_alpha` differs from one to the next), so that each is
a revision of its own, read, hashed, checked and copied like any other. Their weights come from a number of different
files, each several times linked: 2,000 adapters of rank 16 of a model of 135 M weights would be 20 GB else.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from load import Percentiles, RequestTimes, percentiles, stream_request
from prometheus_client.parser import text_string_to_metric_families
from workload import Workload, adapter_name, linear_shapes, write_adapters

from lorry.adapters.device.pool import size_classes
from lorry.adapters.device.slabs import SlabAllocator
from lorry.adapters.layout import ModelLayout
from lorry.adapters.reading.spec import CONFIG_NAME
from lorry.adapters.reading.tensor_file import WEIGHTS_NAME
from lorry.v1 import adapter_pb2, adapter_pb2_grpc
from lorry.v1.generation_pb2_grpc import GenerationServiceStub

PAGE_BYTES = 2  # of an element: bfloat16
PLACES = {
    adapter_pb2.ADAPTER_STATE_DEVICE: "hot",
    adapter_pb2.ADAPTER_STATE_HOST: "warm",
    adapter_pb2.ADAPTER_STATE_REGISTERED: "cold",
}
"""What an adapter is called by where it was when its request was sent: on the device, in host memory, on disk."""


class Drawn(Workload):
    """Uniform means drawn at random, not dealt round: who is asked for next is not who was asked for longest ago."""

    def adapter_of(self) -> list[int | None]:
        if self.popularity != "uniform":
            return super().adapter_of()
        drawn: list[int | None] = (
            np.random.default_rng([self.seed, 4]).integers(self.adapters, size=self.requests).tolist()
        )
        return drawn


def layout_of(model: Path) -> ModelLayout:
    """Of the model whose config.json lies in a folder."""
    config = json.loads((model / "config.json").read_text())
    sites = {site: (inner, out) for site, (out, inner) in linear_shapes(config).items()}
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    ends = {"embed_tokens": (vocabulary, hidden), "lm_head": (hidden, vocabulary)}
    return ModelLayout(config["num_hidden_layers"], sites, ends=ends)


def pool_bytes(layout: ModelLayout, adapters: int, rank: int) -> int:
    """Bytes of the least arena that holds so many adapters of a rank on all linears, within a percent."""
    sizes, rare = size_classes(layout, torch.bfloat16)
    counts = [sum(layout.page_elements(site) == size for _, site in layout.linears()) for size in sizes]
    demand = tuple(count * -(-rank // 16) * adapters for count in counts)
    capacity = sum(number * size for number, size in zip(demand, sizes, strict=True))
    while not SlabAllocator(sizes, capacity, rare).ever_fits(demand):
        capacity += max(1, capacity // 100)
    return capacity * PAGE_BYTES


def write_catalog(base: Path, root: Path, count: int, rank: int, files: int, seed: int = 1) -> Path:
    """A folder of `count` adapters with the weights of `files`; what is there is kept."""
    weights = write_adapters(base, root, min(count, files), rank, seed)
    catalog = root / f"{weights.name}-{files}-files-{count}"
    config = json.loads((weights / adapter_name(0) / CONFIG_NAME).read_text())
    for index in range(count):
        folder = catalog / adapter_name(index)
        if (folder / CONFIG_NAME).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / WEIGHTS_NAME
        link.unlink(missing_ok=True)
        link.hardlink_to(weights / adapter_name(index % files) / WEIGHTS_NAME)
        own = config | {"lora_alpha": 2 * rank + index / 64}
        (folder / CONFIG_NAME).write_text(json.dumps(own, indent=1))
    return catalog


def forget_pages(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache, so that reading them is reading the disk."""
    for path in folder.rglob(WEIGHTS_NAME):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Round:
    """One run of a workload. found: adapters of its requests by the tier that had them, as the server counts them."""

    times: list[RequestTimes]
    first_tokens: dict[str, list[float]]  # by place, seconds
    found: dict[str, int]


@dataclass
class Registered:
    """What so many registered adapters at one popularity showed; one figure a round."""

    adapters: int
    popularity: str
    tokens_per_second: list[float] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    first_tokens: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, run: Round) -> None:
        begin = min(each.sent for each in run.times)
        end = max(each.deltas[-1][0] for each in run.times)
        self.tokens_per_second.append(sum(each.tokens for each in run.times) / (end - begin))
        for tier, count in run.found.items():
            self.found[tier] += count
        for place, seconds in run.first_tokens.items():
            self.first_tokens[place] += seconds

    @property
    def median(self) -> float:
        ordered = sorted(self.tokens_per_second)
        return ordered[len(ordered) // 2]

    @property
    def hit_rate(self) -> float:
        """Share of the requests' adapters that were on the device when the request came."""
        return self.found.get("device", 0) / max(1, sum(self.found.values()))

    def report(self) -> dict[str, Any]:
        places = {place: self.first_tokens.get(place, []) for place in PLACES.values()}
        return {
            "adapters": self.adapters,
            "popularity": self.popularity,
            "tokens_per_second": round(self.median, 2),
            "runs": [round(value, 2) for value in self.tokens_per_second],
            "hit_rate": round(self.hit_rate, 4),
            "found": dict(self.found),
            "time_to_first_token_ms": {place: percentiles(seconds) for place, seconds in places.items()},
            "requests": {place: len(seconds) for place, seconds in places.items()},
        }


def found_by_tier(metrics: str) -> dict[str, int]:
    """lorry_adapter_requests_total of the page at an address."""
    with urllib.request.urlopen(metrics, timeout=60) as answer:
        page = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return {it.labels["tier"]: int(it.value) for it in samples if it.name == "lorry_adapter_requests_total"}


async def ask(target: str, metrics: str, workload: Workload, vocab_size: int, done: Callable[[], None]) -> Round:
    """A closed loop of streams over the workload; before each request its adapter's place is asked for."""
    before = await asyncio.to_thread(found_by_tier, metrics)
    work = list(zip(workload.prompts(vocab_size), workload.adapter_of(), strict=True))
    free = asyncio.Semaphore(workload.streams)
    first_tokens: dict[str, list[float]] = defaultdict(list)
    async with grpc.aio.insecure_channel(target) as channel:
        await channel.channel_ready()
        generation = GenerationServiceStub(channel)
        adapters: Any = adapter_pb2_grpc.AdapterServiceStub(channel)

        async def one(prompt: Sequence[int], adapter: int) -> RequestTimes:
            async with free:
                known = await adapters.GetAdapter(adapter_pb2.GetAdapterRequest(id=adapter_name(adapter)))
                times = await timed(generation, stream_request(workload, prompt, adapter))
            place = PLACES.get(known.adapter.state)  # none: another request has it on its way
            if place is not None:
                first_tokens[place].append(times.time_to_first_token)
            done()
            return times

        times = await asyncio.gather(*(one(prompt, adapter) for prompt, adapter in work if adapter is not None))
    await asyncio.sleep(0.5)  # until the counters have come
    after = await asyncio.to_thread(found_by_tier, metrics)
    return Round(times, dict(first_tokens), {tier: after[tier] - before.get(tier, 0) for tier in after})


async def timed(stub: GenerationServiceStub, request: Any) -> RequestTimes:
    """One stream, to its end; raises RuntimeError when it is not as long as asked."""
    times = RequestTimes(sent=time.perf_counter())
    async for event in stub.GenerateStream(request):
        if event.HasField("delta") and event.delta.token_ids:
            times.deltas.append((time.perf_counter(), len(event.delta.token_ids)))
            times.token_ids.extend(event.delta.token_ids)
    if times.tokens != request.spec.stopping.max_new_tokens:
        raise RuntimeError(f"a stream ended after {times.tokens} tokens")
    return times


@dataclass(frozen=True)
class ColdStart:
    """Time to the first token of adapters that lie on disk, and of the same ones right afterwards, in milliseconds."""

    adapter_bytes: int
    cold_ms: Percentiles
    hot_ms: Percentiles

    @property
    def more_ms(self) -> float:
        """What cold adds, at the median."""
        return self.cold_ms["p50"] - self.hot_ms["p50"]

    def report(self) -> dict[str, Any]:
        return asdict(self) | {"more_ms": round(self.more_ms, 3)}


async def cold_start(target: str, workload: Workload, names: Sequence[str], nbytes: int, vocab_size: int) -> ColdStart:
    """Ask for each of `names`, which nobody has asked for before, twice, one after the other."""
    cold: list[float] = []
    hot: list[float] = []
    prompts = workload.prompts(vocab_size)
    async with grpc.aio.insecure_channel(target) as channel:
        stub = GenerationServiceStub(channel)
        for number, name in enumerate(names):
            for seconds, prompt in ((cold, prompts[2 * number]), (hot, prompts[2 * number + 1])):
                request = stream_request(workload, prompt, 0)
                request.spec.adapters[0].id = name
                request.spec.stopping.max_new_tokens = 2
                seconds.append((await timed(stub, request)).time_to_first_token)
    return ColdStart(nbytes, percentiles(cold), percentiles(hot))
