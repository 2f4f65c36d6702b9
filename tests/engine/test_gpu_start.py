"""The start on a GPU that is not there: what is done in which order, and who gets how much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lorry.adapters.device import pool
from lorry.server.cache.blocks import blocks_for
from lorry.server.config import GIB, MIB, EngineConfig
from lorry.server.engine import build
from lorry.server.engine.channel import LocalChannel
from lorry.server.engine.graphs import Bucket, all_buckets
from lorry.server.engine.runner import Runner
from lorry.server.engine.scheduler import Limits
from lorry.server.engine.start.gpu_start import GpuStart
from lorry.server.engine.start.memory_plan import GRAPH
from lorry.server.engine.start.rehearsal import Peaks
from lorry.server.errors import InvalidField
from lorry.server.model.decoder import Decoder

WEIGHTS, ADAPTERS, CONTEXT, WORKSPACE = 5 * GIB, 2 * GIB, GIB, 64 * MIB
PEAKS = Peaks(step=3 * GIB, decode=GIB)


class Gpu:
    """80 GiB, of which others and the context hold one; `log` is what happened."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.told: list[tuple[str, int, int]] = []
        self.total, self.held = 80 * GIB, WEIGHTS
        self.unseen = 0  # in use, but not for tensors

    @property
    def free(self) -> int:
        return self.total - CONTEXT - self.held - self.unseen

    def peak(self, run: Callable[[], object]) -> int:
        raise AssertionError

    def progress(self, stage: str, done: int, total: int) -> None:
        self.told.append((stage, done, total))


class Played:
    """A rehearsal of three steps, which leave a workspace behind."""

    steps = 3

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def compile(self, threads: int, progress: Callable[[str, int, int], None]) -> None:
        assert threads == 7
        self.gpu.log.append("compile")
        progress("compile", 1, 1)

    def warm_up(self, done: Callable[[int], None]) -> None:
        self.gpu.log.append("warm up")
        self.gpu.held += WORKSPACE
        for number in range(self.steps + 1):
            done(number)

    def measure(self, memory: object) -> Peaks:
        assert memory is self.gpu
        self.gpu.log.append("measure")
        return PEAKS


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


LIMITS = Limits(max_running=4, token_budget=64, context_length=1000)


def started(gpu: Gpu, **changes: Any) -> GpuStart:
    return GpuStart(EngineConfig(threads=7, **changes), LIMITS, gpu, gpu.progress)


def test_the_cache_gets_what_is_left(gpu: Gpu) -> None:
    start = started(gpu)
    gpu.held += ADAPTERS
    graphs = PEAKS.decode + len(all_buckets(4, blocks_for(1000))) * GRAPH
    left = 72 * GIB - WEIGHTS - ADAPTERS - WORKSPACE - PEAKS.step - graphs
    assert start.blocks(Played(gpu), 500 * MIB) == left // (500 * MIB) > 100
    assert gpu.log == ["compile", "warm up", "measure"]
    assert start.activations == WORKSPACE + PEAKS.step


def test_without_graphs_their_share_is_the_caches(gpu: Gpu) -> None:
    start = started(gpu, cuda_graphs=False)
    gpu.held += ADAPTERS
    left = 72 * GIB - WEIGHTS - ADAPTERS - WORKSPACE - PEAKS.step
    assert start.blocks(Played(gpu), 500 * MIB) == left // (500 * MIB)
    start.record(Recording(gpu), LIMITS)  # type: ignore[arg-type]
    assert start.graphs == 0 and gpu.log == ["compile", "warm up", "measure"]


class Recording:
    """A runner whose graphs take 10 MiB each, which torch knows nothing of."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self, buckets: list[Bucket]) -> Iterator[Bucket]:
        assert torch.is_inference_mode_enabled()
        self.gpu.log.append(f"record {len(buckets)}")
        for bucket in buckets:
            self.gpu.unseen += 10 * MIB
            yield bucket


def test_graphs_are_recorded_last_and_the_bar_reaches_its_end(gpu: Gpu) -> None:
    start = started(gpu)
    start.blocks(Played(gpu), 500 * MIB)
    start.record(Recording(gpu), LIMITS)  # type: ignore[arg-type]
    count = len(all_buckets(4, blocks_for(1000)))
    assert gpu.log[-1] == f"record {count}" and start.graphs == count * 10 * MIB
    bar = [(done, total) for stage, done, total in gpu.told if stage == "warm up"]
    assert bar == [(done, 3 + count) for done in range(3 + count + 1)]


def test_adapters_that_do_not_fit_are_refused_before_they_are_made(gpu: Gpu) -> None:
    start = started(gpu)
    start.check_adapters(73 * GIB)
    with pytest.raises(
        InvalidField, match=r"adapter_memory is 74\.0 GiB, but 1\.0 GiB .* leaves 73\.5 GiB after 5\.0 GiB"
    ):
        start.check_adapters(74 * GIB)


def test_a_fraction_that_is_none_is_refused_at_once(gpu: Gpu) -> None:
    with pytest.raises(InvalidField, match="gpu_memory_fraction"):
        started(gpu, gpu_memory_fraction=1.5)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `build_engine` does on a GPU, in host memory, with stand-ins for what needs the device."""
    order: list[str] = []
    gpu = Gpu()

    def noted(name: str, call: Any) -> Any:
        return lambda *args, **kwargs: (order.append(name), call(*args, **kwargs))[1]

    def rehearsed(*_: object, adapters: int, pages: int, graph_pages: int, logits_rows: int) -> Played:
        order.append("rehearsal")
        assert (adapters, pages, graph_pages, logits_rows) == (8, 128, 16, 64)
        gpu.log = order
        return Played(gpu)

    monkeypatch.setattr(build.Types, "on_gpu", True)
    monkeypatch.setattr(build, "CudaMemory", lambda device: gpu)
    monkeypatch.setattr(build, "PagePool", noted("pages", pool.PagePool))
    monkeypatch.setattr(build, "Rehearsal", rehearsed)
    monkeypatch.setattr(build, "KVCache", noted("cache", build.KVCache))
    monkeypatch.setattr(Runner, "record", lambda self, buckets: Recording(gpu).record(buckets))
    return order


def test_the_order_of_an_engines_start(order: list[str], decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(
        device="cpu", kv_dtype="float32", adapter_memory=8 * MIB, max_running=4, token_budget=64, threads=7
    )
    told: list[str] = []
    with caplog.at_level(logging.INFO):
        engine = build.build_engine(
            config, build.Types.choose(config), decoder, LocalChannel(), lambda stage, done, total: told.append(stage)
        )
    try:
        assert order == ["pages", "rehearsal", "compile", "warm up", "measure", "cache", "record 12"]
        assert list(dict.fromkeys(told)) == ["compile", "warm up"]
        assert engine.runner.kv.num_blocks == 4 * blocks_for(300)
        line = next(message for message in caplog.messages if message.startswith("memory: "))
        assert "activations 3.1 GiB · graphs 120 MiB · KV " in line and "(76 blocks, 1,216 tokens)" in line
    finally:
        engine.adapters.manager.close()


def test_the_line_on_a_cpu(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine = build(blocks=10)
    line = next(message for message in caplog.messages if message.startswith("memory: "))
    assert "activations" not in line and "(10 blocks, 160 tokens)" in line
    assert f"({engine.engine.adapters.manager.pool.pages_total:,} pages)" in line
