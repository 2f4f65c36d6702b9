"""Inter-token latency of streams while a server loads and unloads other adapters, against the same without.

A round is a phase without loads and one with them, one behind the other, so that the machine is the same for both, and
whichever was first in one round is the second in the next; within a phase all streams begin together, on prompts of
their own. What counts is the median over the rounds of the ratio of the two 99th percentiles: one disturbance from
outside spoils one round.

All streams take part in each step, so a phase has as many independent samples as a stream has gaps: 400 tokens, four
gaps beyond the 99th percentile.

python bench/bystanders.py --rounds 3 --new-tokens 200          # the short form; prints who used the processor too
python bench/bystanders.py                                      # 9 rounds of 400 tokens, about ten minutes on two cores
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
from load import Percentiles, drive, percentiles
from rich.console import Console
from rich.table import Table
from server_process import started
from workload import Workload, adapter_name, bench_folder, write_adapters

from lorry.server.config import DEFAULT_MODEL
from lorry.server.model.store import resolve_model
from lorry.v1 import adapter_pb2, adapter_pb2_grpc, control_pb2, control_pb2_grpc

FOLDERS = 4  # that are loaded in turn
AT_ONCE = 2  # loads under way
SEED = 99  # of the guests, which no stream uses
TRIES = 5  # of a phase: on a busy machine short answers may come whole


@dataclass(frozen=True)
class Latencies:
    """Inter-token latency in milliseconds; loads: adapters that came and went meanwhile, in `seconds`.

    rounds: the 99th percentiles of each, without loads and with them; gaps: how many of one stream lie behind each.
    """

    quiet_ms: Percentiles
    loading_ms: Percentiles
    loads: int
    seconds: float
    rounds: Sequence[tuple[float, float]]
    gaps: int

    @property
    def more(self) -> float:
        """By how much the 99th percentile is greater while adapters load, the median round: 0.03 is 3 %."""
        return statistics.median(loading / quiet for quiet, loading in self.rounds) - 1

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
    """Load one adapter after the other until told to stop, unload each when it is there; how many that were.

    Each is touched before: as far as the server can tell, it has never seen these files.
    """
    stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)

    async def one_by_one(visitor: int) -> int:
        count = 0
        own = itertools.cycle(guests.folders[visitor::AT_ONCE])
        while not stop.is_set():
            path = next(own)
            name = f"guest-{visitor}-{count}"
            os.utime(guests.root / path / "adapter_config.json")
            await stub.LoadAdapter(adapter_pb2.LoadAdapterRequest(id=name, path=path))
            await stub.UnloadAdapter(adapter_pb2.UnloadAdapterRequest(id=name))
            count += 1
        return count

    return sum(await asyncio.gather(*map(one_by_one, range(AT_ONCE))))


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


def bystanders(target: str, workload: Workload, vocab_size: int, guests: Guests, rounds: int) -> Latencies:
    """Of the workload's streams, all at once, with guests and without, after a phase that warms up."""
    gaps: dict[bool, list[float]] = {False: [], True: []}
    p99s: list[tuple[float, float]] = []
    loads, seconds, numbers = 0, 0.0, itertools.count(1)
    asyncio.run(phase(target, workload.again(0), vocab_size, guests))
    for number in range(rounds):
        p99: dict[bool, float] = {}
        for loading in (False, True) if number % 2 == 0 else (True, False):
            begin = time.perf_counter()
            for _ in range(TRIES):
                again = workload.again(next(numbers))
                found, count = asyncio.run(phase(target, again, vocab_size, guests if loading else None))
                if found:
                    break
            else:
                raise RuntimeError(f"{TRIES} times all answers came whole: there are no gaps between tokens to measure")
            loads, seconds = loads + count, seconds + (time.perf_counter() - begin) * loading
            gaps[loading] += found
            p99[loading] = percentiles(found)["p99"]
        p99s.append((p99[False], p99[True]))
    return Latencies(percentiles(gaps[False]), percentiles(gaps[True]), loads, seconds, p99s, workload.new_tokens - 1)


def show(found: Latencies) -> Table:
    ratios = ", ".join(f"{loading / quiet - 1:+.0%}" for quiet, loading in found.rounds)
    table = Table(
        title=f"bystanders: p99 {found.more:+.1%} while adapters load, the median of {ratios}"
        f" · {found.gaps} gaps of a stream each · {found.loads} loads in {found.seconds:.1f} s"
    )
    for column in ("inter token latency, ms", *found.quiet_ms):
        table.add_column(column, justify="right")
    for name, values in (("quiet", found.quiet_ms), ("while adapters load", found.loading_ms)):
        table.add_row(name, *(f"{value:.2f}" for value in values.values()))
    return table


def processor_time(pid: int) -> dict[str, float]:
    """Seconds that each thread of a server has computed, by process and thread."""
    found = {}
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        for thread in process.threads():
            name = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text().strip()
            found[f"{process.pid} {thread.id} {name}"] = thread.user_time + thread.system_time
    return found


def main(
    model: Annotated[str, typer.Option(help="What the server serves.")] = DEFAULT_MODEL,
    streams: Annotated[int, typer.Option(min=1)] = 16,
    adapters: Annotated[int, typer.Option(min=0, help="Of the streams.")] = 8,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 400,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    server_option: Annotated[list[str] | None, typer.Option(help='Such as "--threads=1".')] = None,
) -> None:
    """Measure a server of its own, and show what its threads have computed."""
    root, base = bench_folder(), resolve_model(model)
    guests = Guests.write(base, root / "guests", rank)
    folder = write_adapters(base, root, adapters, rank)
    folder.mkdir(parents=True, exist_ok=True)
    workload = Workload(streams=streams, requests=streams, prompt_tokens=16, new_tokens=new_tokens, adapters=adapters)
    options = [*(server_option or []), guests.server_option]
    with started(model, folder, root / "lorry-bystanders.log", options) as server:
        with grpc.insecure_channel(server.target) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            size = int(stub.GetModelInfo(control_pb2.GetModelInfoRequest()).vocab_size)
        begin, before = time.perf_counter(), processor_time(server.pid)
        found = bystanders(server.target, workload, size, guests, rounds)
        seconds, after = time.perf_counter() - begin, processor_time(server.pid)
    console = Console()
    console.print(show(found))
    for name, used in sorted(after.items(), key=lambda item: -item[1]):
        if (share := (used - before.get(name, 0.0)) / seconds) > 0.002:
            console.print(f"{share:7.1%} of a core  {name}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
