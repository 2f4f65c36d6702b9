"""How an engine on a GPU starts: the KV cache gets what is left when all else has been made, run and measured.

weights ─▶ adapters' pages ─▶ compile ─▶ launch ─▶ measure the largest steps ─▶ KV cache ─▶ record graphs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from lorry.server.config import EngineConfig
from lorry.server.engine.graphs import Bucket, all_buckets
from lorry.server.engine.runner import Runner
from lorry.server.engine.scheduler import Limits
from lorry.server.engine.start.memory import DeviceMemory, processors
from lorry.server.engine.start.memory_plan import Taken, check_adapter_memory, check_fraction, graph_memory, kv_blocks
from lorry.server.engine.start.rehearsal import Peaks
from lorry.server.engine.start.warm_up import table_width

Progress = Callable[[str, int, int], None]


class Rehearsing(Protocol):
    """`rehearsal.Rehearsal`, for which tests have a stand-in."""

    @property
    def steps(self) -> int: ...

    def compile(self, threads: int, progress: Progress) -> None: ...

    def warm_up(self, done: Callable[[int], None]) -> None: ...

    def measure(self, memory: DeviceMemory) -> Peaks: ...


class GpuStart:
    """Made when the weights are held and nothing else; then its methods in their order."""

    def __init__(self, config: EngineConfig, limits: Limits, memory: DeviceMemory, progress: Progress) -> None:
        check_fraction(config.gpu_memory_fraction)
        self._config = config
        self._limits = limits
        self._memory = memory
        self._progress = progress
        self._weights = memory.held
        self._steps = 0
        self.activations = self.graphs = 0  # bytes, for the line at start

    def check_adapters(self, size: int) -> None:
        """Raises InvalidField where `size` bytes of pages do not fit."""
        check_adapter_memory(self._taken(0), size)

    def blocks(self, rehearsal: Rehearsing, bytes_per_block: int) -> int:
        """Compile, launch, measure: the blocks of the KV cache. What is held beside the weights are the adapters.

        Raises InvalidField, see `kv_blocks`.
        """
        config, limits, memory = self._config, self._limits, self._memory
        adapters = memory.held - self._weights
        rehearsal.compile(config.threads or processors(), self._progress)
        self._steps = rehearsal.steps
        rehearsal.warm_up(self._warmed_up)
        peaks = rehearsal.measure(memory)
        kept = memory.held - self._weights - adapters  # workspaces of libraries, which stay
        self.activations = kept + peaks.step
        taken = self._taken(adapters, self.activations, graph_memory(peaks.decode, len(self._buckets())))
        return kv_blocks(
            taken,
            bytes_per_block,
            gpu_memory_fraction=config.gpu_memory_fraction,
            kv_memory=config.kv_memory,
            max_running=limits.max_running,
            context_length=limits.context_length,
        )

    def record(self, runner: Runner, limits: Limits) -> None:
        """Record the decode steps as graphs, where the configuration wants it; limits: what the cache left of them."""
        self._limits, free = limits, self._memory.free
        with torch.inference_mode():
            if buckets := self._buckets():
                for done, _ in enumerate(runner.record(buckets), 1):
                    self._warmed_up(self._steps + done)
        self.graphs = max(0, free - self._memory.free)

    def _buckets(self) -> list[Bucket]:
        if not self._config.cuda_graphs:
            return []
        return all_buckets(self._limits.max_running, table_width(self._limits))

    def _warmed_up(self, done: int) -> None:
        self._progress("warm up", done, self._steps + len(self._buckets()))

    def _taken(self, adapters: int, activations: int = 0, graphs: int = 0) -> Taken:
        total, held = self._memory.total, self._memory.held
        return Taken(total, total - self._memory.free - held, self._weights, adapters, activations, graphs)
