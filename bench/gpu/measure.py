"""Times on a GPU: replays of CUDA graphs whose calls rotate through more memory than the L2 cache holds.

A case yields figures after its checks; `Wrong` means that a kernel's answer is, and that nothing of the case counts.
In a dry run everything happens once, in tiny shapes, in Triton's interpreter, and nothing is timed.
"""

from __future__ import annotations

import math
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]

GRAPH_SECONDS = 6e-3  # of one replay, by the time of launches without a graph; its start must be nothing beside it
MOST_CALLS = 512  # in a graph
COLD = 3  # times the L2 cache, over all calls of a graph


class Wrong(Exception):
    """A kernel's answer is not the reference's."""


@dataclass
class Figure:
    """One measurement. seconds: of one call, None in a dry run; bytes: an ideal kernel's traffic; flops: its work;
    peers: seconds of others at the same task; parts: seconds that ours was made of; eager: the names of those ("ours")
    that no graph could hold."""

    op: str
    shape: str
    rows: int
    seconds: float | None
    bytes: float
    flops: float = 0.0
    plan: str = ""
    peers: dict[str, float | None] = field(default_factory=dict)
    parts: dict[str, float | None] = field(default_factory=dict)
    eager: list[str] = field(default_factory=list)

    def report(self, limits: Limits | None) -> dict[str, Any]:
        """Plain values with the ratios to the limits of the same run: shares of bandwidth and of the product's rate,
        times our speed over each peer's."""
        row: dict[str, Any] = {"op": self.op, "shape": self.shape, "rows": self.rows, "plan": self.plan}
        if self.seconds is None or limits is None:
            return row | {"microseconds": None, "peers": dict.fromkeys(self.peers)}
        row |= {
            "microseconds": self.seconds * 1e6,
            "gb_s": self.bytes / self.seconds / 1e9,
            "of_copy": self.bytes / self.seconds / limits.copy,
            "times_bytes_bound": self.seconds * limits.copy / self.bytes if self.bytes else None,
        }
        if self.flops:
            row |= {"tflop_s": self.flops / self.seconds / 1e12, "of_cublas": self.flops / self.seconds / limits.cublas}
        known = {name: seconds for name, seconds in self.peers.items() if seconds is not None}
        row["peers"] = {name: seconds * 1e6 for name, seconds in known.items()}
        row["faster_than"] = {name: seconds / self.seconds for name, seconds in known.items()}
        if self.parts:
            row["parts"] = {name: seconds and seconds * 1e6 for name, seconds in self.parts.items()}
        return row | ({"eager": self.eager} if self.eager else {})


@dataclass(frozen=True)
class Limits:
    """What this GPU reached in this run. copy: bytes per second, read and written; cublas: bf16 operations a second."""

    copy: float
    cublas: float


@dataclass(frozen=True)
class Stage:
    """Where a case runs."""

    device: str
    dry: bool = False
    quick: bool = False

    def pick(self, real: Any, tiny: Any) -> Any:
        """`tiny` in a dry run."""
        return tiny if self.dry else real

    def some(self, values: Sequence[Any]) -> Sequence[Any]:
        """First and last in a quick run."""
        return [values[0], values[-1]] if self.quick and len(values) > 2 else values

    @cached_property
    def sms(self) -> int:
        return 4 if self.dry else int(torch.cuda.get_device_properties(0).multi_processor_count)

    def copies(self, nbytes: float, most: int = MOST_CALLS) -> int:
        """How many inputs of `nbytes` make the L2 cache cold for each."""
        if self.dry:
            return 1
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return max(1, min(most, math.ceil(COLD * cache / nbytes)))

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)

    def time(self, calls: Sequence[Call], eager: list[str] | None = None, name: str = "ours") -> float | None:
        """Median seconds of a call. calls: the same work on inputs of their own; eager: gets the name of what no graph
        could hold."""
        for call in calls[:1] if self.dry else calls:
            call()
        if self.dry:
            return None
        torch.cuda.synchronize()
        once = elapsed(lambda: [call() for call in calls])
        wanted = min(MOST_CALLS, max(len(calls), math.ceil(GRAPH_SECONDS / (once / len(calls)))))
        order = list(islice(cycle(calls), wanted))
        try:
            replay = captured(order)
        except RuntimeError:
            torch.cuda.synchronize()
            if eager is not None:
                eager.append(name)

            def replay() -> None:
                for call in order:
                    call()

        replay()
        torch.cuda.synchronize()
        rounds = max(3, min(3 if self.quick else 25, math.ceil(0.2 / (once * wanted / len(calls)))))
        return statistics.median(elapsed(replay) for _ in range(rounds)) / wanted


def captured(calls: Sequence[Call]) -> Call:
    """The calls as one CUDA graph. What they return is kept by the graph's memory pool, not by the caller."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def elapsed(call: Call) -> float:
    """Seconds between two events around the call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def expect_close(what: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """Raises Wrong unless the RMS of the difference is below `limit` and its maximum below 30 times that, both over the
    RMS of `expected`; NaN is wrong."""
    difference, size = actual.double() - expected.double(), float(expected.double().square().mean().sqrt())
    rms, most = float(difference.square().mean().sqrt()) / size, float(difference.abs().max()) / size
    if not (rms < limit and most < 30 * limit):
        raise Wrong(f"{what}: error {rms:.1e} RMS, {most:.1e} at most; limit {limit:.0e}")


def measure_limits(stage: Stage) -> Limits | None:
    """Copy of 1 GiB, product of 8192³ in bf16."""
    if stage.dry:
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    copied = stage.time([lambda: target.copy_(source)])
    a, b = stage.randn(8192, 8192), stage.randn(8192, 8192)
    multiplied = stage.time([lambda: torch.mm(a, b)])
    assert copied is not None and multiplied is not None
    return Limits(2 * source.nbytes / copied, 2 * 8192**3 / multiplied)


def describe_device() -> dict[str, Any]:
    """What figures depend on besides versions."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        driver = answer[0] if answer else None
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver,
    }


Case = Callable[[Stage], Iterator[Figure]]
