"""Who gets how much of a GPU's memory, and the line at start that says so.

    budget = min(gpu_memory_fraction * total, total - others - SPARE)
    KV     = budget - weights - adapters - activations - graphs,    in whole blocks, or `kv_memory` where it is given

Everything but the KV cache is there, or was measured by a profiling pass, before this is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for
from lorry.server.config import GIB, MIB
from lorry.server.errors import InvalidField

SPARE = 512 * MIB  # for the kernels' code and for what rounding the cache's tensors up takes; not yet measured
GRAPH = 2 * MIB  # that the driver keeps for a recorded graph; not yet measured


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes that are gone before the KV cache is made.

    others: what this process does not hold, and its CUDA context; weights, adapters: held; activations: the most that
    a step takes besides; graphs: what recorded graphs will take.
    """

    total: int
    others: int
    weights: int
    adapters: int
    activations: int = 0
    graphs: int = 0

    @property
    def own(self) -> int:
        return self.weights + self.adapters + self.activations + self.graphs


def graph_memory(step: int, count: int) -> int:
    """Bytes for `count` graphs that share one pool; step: what the largest of them takes."""
    return step + count * GRAPH if count else 0


def check_fraction(gpu_memory_fraction: float) -> None:
    """Raises InvalidField for what is not a share."""
    if not 0 < gpu_memory_fraction <= 1:
        raise InvalidField(
            f"gpu_memory_fraction is {gpu_memory_fraction}, a share above 0 and up to 1 is expected",
            field="gpu_memory_fraction",
        )


def check_adapter_memory(taken: Taken, adapter_memory: int) -> None:
    """Raises InvalidField where so many bytes of pages do not fit beside what is taken."""
    there = taken.total - taken.others - SPARE - taken.weights
    if adapter_memory > there:
        raise InvalidField(
            f"adapter_memory is {size(adapter_memory)}, but {_holds(taken)}, which leaves {size(there)} after "
            f"{size(taken.weights)} of weights; lower it",
            field="adapter_memory",
        )


def kv_blocks(
    taken: Taken,
    bytes_per_block: int,
    *,
    gpu_memory_fraction: float,
    kv_memory: int | None,
    max_running: int,
    context_length: int,
) -> int:
    """Blocks of the KV cache on a GPU, no more than `max_running` sequences of full context can ever use.

    Raises InvalidField, which names the setting and the sizes, where not even one block is left, or less than
    `kv_memory`.
    """
    check_fraction(gpu_memory_fraction)
    share, there = int(gpu_memory_fraction * taken.total), taken.total - taken.others - SPARE
    left = min(share, there) - taken.own
    most = max_running * blocks_for(context_length)
    block = f"a block takes {size(bytes_per_block)}"
    if kv_memory is not None:
        blocks = min(kv_memory // bytes_per_block, most)
        if blocks < 1:
            raise InvalidField(f"kv_memory is {size(kv_memory)}, but {block}; raise it", field="kv_memory")
        if blocks * bytes_per_block > there - taken.own:
            raise InvalidField(
                f"kv_memory is {size(kv_memory)}, but {_holds(taken)}, which {_leaves(there, taken, block)}; "
                "lower it or adapter_memory",
                field="kv_memory",
            )
        return blocks
    if left >= bytes_per_block:
        return min(left // bytes_per_block, most)
    if there < share:
        raise InvalidField(
            f"{_holds(taken)}, which {_leaves(there, taken, block)}; free some of it or lower adapter_memory",
            field="gpu_memory_fraction",
        )
    raise InvalidField(
        f"gpu_memory_fraction {gpu_memory_fraction:.2f} of {size(taken.total)} {_leaves(share, taken, block)}; "
        "raise it or lower adapter_memory or token_budget",
        field="gpu_memory_fraction",
    )


def _holds(taken: Taken) -> str:
    return f"{size(taken.others)} of the GPU's {size(taken.total)} are in use by others"


def _leaves(budget: int, taken: Taken, block: str) -> str:
    parts = [f"{size(taken.weights)} of weights", f"{size(taken.adapters)} of adapters"]
    parts += [f"{size(taken.activations)} of activations"] * (taken.activations > 0)
    parts += [f"{size(taken.graphs)} of graphs"] * (taken.graphs > 0)
    after = f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"leaves {size(budget - taken.own)} for the key and value cache ({block}) after {after}"


def memory_line(
    *, weights: int, adapters: int, pages: int, kv: int, blocks: int, free: int, activations: int = 0, graphs: int = 0
) -> str:
    """The line at start, of bytes but for `pages` and `blocks`; activations and graphs only where there are some."""
    parts = [f"weights {size(weights)}", f"adapters {size(adapters)} ({pages:,} pages)"]
    parts += [f"activations {size(activations)}"] * (activations > 0)
    parts += [f"graphs {size(graphs)}"] * (graphs > 0)
    parts += [f"KV {size(kv)} ({blocks:,} blocks, {blocks * BLOCK_SIZE:,} tokens)", f"free {size(free)}"]
    return "memory: " + " · ".join(parts)


def size(count: int) -> str:
    """Bytes for people."""
    if abs(count) >= GIB:
        return f"{count / GIB:.1f} GiB"
    if abs(count) >= 10 * MIB:
        return f"{count / MIB:.0f} MiB"
    return f"{count / MIB:.1f} MiB" if abs(count) >= MIB / 10 else f"{count} bytes"
