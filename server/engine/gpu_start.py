"""How an engine on a GPU comes to the size of its KV cache: everything else is made, run and measured first.

weights ─▶ adapters' pages ─▶ compile ─▶ launch ─▶ measure the largest steps ─▶ KV cache ─▶ graphs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lorry.server.config import EngineConfig
from lorry.server.engine.memory import DeviceMemory, processors
from lorry.server.engine.memory_plan import Taken, graph_memory, kv_blocks
from lorry.server.engine.rehearsal import Peaks
from lorry.server.engine.scheduler import Limits

Progress = Callable[[str, int, int], None]


class Rehearsing(Protocol):
    """`rehearsal.Rehearsal`, for which tests have a stand-in."""

    def compile(self, threads: int, progress: Progress) -> None: ...

    def warm_up(self, progress: Progress) -> None: ...

    def measure(self, memory: DeviceMemory) -> Peaks: ...


def share_out(
    config: EngineConfig,
    limits: Limits,
    memory: DeviceMemory,
    rehearsal: Rehearsing,
    *,
    weights: int,
    adapters: int,
    graphs: int,
    bytes_per_block: int,
    progress: Progress,
) -> tuple[Taken, int]:
    """Compile, warm up and measure; who takes how much, and the blocks that are left for the KV cache.

    weights, adapters: bytes held for them, which is all that is held; graphs: how many will be recorded.
    Raises InvalidField, see `kv_blocks`.
    """
    rehearsal.compile(config.threads or processors(), progress)
    rehearsal.warm_up(progress)
    peaks = rehearsal.measure(memory)
    held = memory.held
    kept = held - weights - adapters  # workspaces of libraries, which stay
    taken = Taken(
        total=memory.total,
        others=memory.total - memory.free - held,
        weights=weights,
        adapters=adapters,
        activations=kept + peaks.step,
        graphs=graph_memory(peaks.decode, graphs),
    )
    blocks = kv_blocks(
        taken,
        bytes_per_block,
        gpu_memory_fraction=config.gpu_memory_fraction,
        kv_memory=config.kv_memory,
        max_running=limits.max_running,
        context_length=limits.context_length,
    )
    return taken, blocks
