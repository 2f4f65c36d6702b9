"""Inter-token latency of streams while a server loads and unloads other adapters, against the same without.

Phases with and without loads in turn, in one run, so that the machine is the same for both; within a phase all streams
begin together, on prompts of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from load import Percentiles, drive, percentiles
from rich.table import Table
from workload import Workload, adapter_name, write_adapters

from lorry.v1 import adapter_pb2, adapter_pb2_grpc

FOLDERS = 4  # that are loaded in turn
AT_ONCE = 2  # loads under way
SEED = 99  # of the guests, which no stream uses


@dataclass(frozen=True)
class Latencies:
    """Inter-token latency in milliseconds; loads: adapters that came and went meanwhile, in `seconds`."""

    quiet_ms: Percentiles
    loading_ms: Percentiles
    loads: int
    seconds: float

    @property
    def more(self) -> float:
        """By how much the 99th percentile is greater while adapters load: 0.03 is 3 %."""
        return self.loading_ms["p99"] / self.quiet_ms["p99"] - 1

    def report(self) -> dict[str, Any]:
        return asdict(self) | {"p99_more": self.more}


@dataclass(frozen=True)
class Guests:
    """Adapters that no stream uses: folders below a root of the server, which is to be started with it."""

    root: Path
    folders: Sequence[str]

    @classmethod
    def write(cls, model: Path, root: Path, rank: int) -> Guests:
        """Random ones for the model whose config.json lies in folder `model`; those that are there are kept."""
        folder = write_adapters(model, root, FOLDERS, rank, SEED)
        return cls(root, [f"{folder.name}/{adapter_name(number)}" for number in range(FOLDERS)])

    @property
    def server_option(self) -> str:
        return f"--adapter-root={self.root}"


async def visit(channel: grpc.aio.Channel, guests: Guests, stop: asyncio.Event) -> int:
    """Load one adapter after the other until told to stop, unload each when it is there; how many that were."""
    stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
    numbers = itertools.count()

    async def one_by_one() -> int:
        count = 0
        while not stop.is_set():
            number = next(numbers)
            name = f"guest-{number}"
            path = guests.folders[number % len(guests.folders)]
            await stub.LoadAdapter(adapter_pb2.LoadAdapterRequest(id=name, path=path))
            await stub.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(id=name))
            count += 1
        return count

    return sum(await asyncio.gather(*(one_by_one() for _ in range(AT_ONCE))))


async def phase(target: str, workload: Workload, vocab_size: int, guests: Guests | None) -> tuple[list[float], int]:
    """Gaps between tokens of all streams, in seconds, and the loads beside them."""
    async with grpc.aio.insecure_channel(target) as channel:
        stop = asyncio.Event()
        visitors = asyncio.create_task(visit(channel, guests, stop)) if guests is not None else None
        try:
            times = await drive(target, workload, vocab_size)
        finally:
            stop.set()
            loads = await visitors if visitors is not None else 0
    return [gap for each in times for gap in each.gaps()], loads


def bystanders(target: str, workload: Workload, vocab_size: int, guests: Guests, phases: int) -> Latencies:
    """Of the workload's streams, all at once, `phases` times with guests and as often without, after one that warms
    up."""
    gaps: dict[bool, list[float]] = {False: [], True: []}
    loads, seconds = 0, 0.0
    order = [False, *[False, True] * phases]
    for number, loading in enumerate(order):
        begin = time.perf_counter()
        found, count = asyncio.run(phase(target, workload.again(number), vocab_size, guests if loading else None))
        took = time.perf_counter() - begin
        if number:
            gaps[loading] += found
            loads, seconds = loads + count, seconds + took * loading
    return Latencies(percentiles(gaps[False]), percentiles(gaps[True]), loads, seconds)


def show(found: Latencies) -> Table:
    table = Table(
        title=f"bystanders: p99 {found.more:+.1%} while adapters load · {found.loads} loads in {found.seconds:.1f} s"
    )
    for column in ("inter token latency, ms", *found.quiet_ms):
        table.add_column(column, justify="right")
    for name, values in (("quiet", found.quiet_ms), ("while adapters load", found.loading_ms)):
        table.add_row(name, *(f"{value:.2f}" for value in values.values()))
    return table
