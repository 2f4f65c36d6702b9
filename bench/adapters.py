"""Measure a server of which most adapters are not on the device: 1 to 2,000 registered ones, a pool of 16.

python bench/adapters.py                       # about twenty minutes on two cores; 2.5 GB in the user's cache
python bench/adapters.py --quick               # one round, few requests
python bench/adapters.py --replot bench/results/adapters-cpu.json

For each number of adapters a server of its own; all of them are there at once and take turns, so that the machine is
the same for all. Adapters are asked for uniformly and by Zipf's law, in a closed loop of streams that all end after as
many tokens. Beside that: what a load does to streams that have nothing to do with it, what a cold adapter costs its own
request, and what it takes to register thousands.

Before any figure counts, adapters that were evicted and came back must answer as they did before. Exits with 1 when
they do not, or when a floor is not reached.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import bystanders as standing_by
import grpc
import psutil
import torch
import typer
from load import drive
from registered import (
    ColdStart,
    Drawn,
    Registered,
    ask,
    cold_start,
    forget_pages,
    layout_of,
    pool_bytes,
    write_catalog,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serve import machine, vocab_size
from server_process import Server, free_port, started
from workload import Popularity, Workload, adapter_name, bench_folder

from lorry.server.config import DEFAULT_MODEL
from lorry.server.model.store import resolve_model
from lorry.v1 import adapter_pb2, adapter_pb2_grpc

console = Console()

COUNTS = (1, 8, 64, 512, 2000)
FEW, MANY = 8, 2000  # registered adapters whose throughput is compared
FLOORS = {
    "many_over_few": (0.70, "at least"),  # throughput at Zipf(1)
    "bystanders_p99_more": (0.25, "at most"),
    "cold_more_ms": (500.0, "at most"),
    "cold_beside_streams_more_ms": (500.0, "at most"),
    "register_seconds": (5.0, "at most"),
    "register_bytes": (200e6, "at most"),
}


@dataclass
class Plan:
    """What is measured, and where it lies."""

    model: str
    root: Path
    counts: Sequence[int]
    pool: int
    rank: int
    files: int
    options: list[str]
    workload: Workload
    repeats: int
    register: int
    cold: int
    base: Path = field(init=False)

    def __post_init__(self) -> None:
        self.base = resolve_model(self.model)

    @property
    def adapter_bytes(self) -> int:
        layout = layout_of(self.base)
        return sum(layout.page_elements(site) for _, site in layout.linears()) * 2 * -(-self.rank // 16)

    def server_options(self, metrics_port: int) -> list[str]:
        memory = pool_bytes(layout_of(self.base), self.pool, self.rank)
        return [f"--adapter-memory={memory}", f"--metrics-port={metrics_port}", *self.options]

    def of(self, count: int, popularity: Popularity, number: int) -> Workload:
        return replace(self.workload.again(number), adapters=count, popularity=popularity)


def memory(pid: int) -> int:
    """Bytes that a server's processes have for themselves."""
    parent = psutil.Process(pid)
    return sum(each.memory_full_info().uss for each in [parent, *parent.children(recursive=True)])


def rounds(plan: Plan) -> tuple[list[Registered], dict[str, Any]]:
    """All numbers of adapters at both popularities, in turn; what each server took to start."""
    results = {(n, p): Registered(n, p) for n in plan.counts for p in get_args(Popularity)}
    starts: dict[str, Any] = {}
    with ExitStack() as stack:
        servers: dict[int, tuple[Server, str]] = {}
        for count in plan.counts:
            catalog = write_catalog(plan.base, plan.root, count, plan.rank, plan.files)
            port, log = free_port(), plan.root / f"lorry-{count}.log"
            server = stack.enter_context(started(plan.model, catalog, log, plan.server_options(port)))
            servers[count] = server, f"http://127.0.0.1:{port}/metrics"
            starts[str(count)] = {"seconds": round(server.seconds, 2), "bytes": memory(server.pid)}
        size = vocab_size(servers[plan.counts[0]][0].target)
        check(servers[max(plan.counts)][0].target, plan, size)
        forget_pages(write_catalog(plan.base, plan.root, max(plan.counts), plan.rank, plan.files))
        with Progress(console=console, transient=True) as progress:
            total = plan.workload.requests * len(results) * (plan.repeats + 1)
            task = progress.add_task("requests", total=total)
            for number in range(plan.repeats + 1):
                for (count, popularity), result in results.items():
                    server, metrics = servers[count]
                    workload = plan.of(count, popularity, number)
                    run = asyncio.run(ask(server.target, metrics, workload, size, lambda: progress.advance(task)))
                    if number:  # the first one warms up
                        result.add(run)
    return list(results.values()), starts


def check(target: str, plan: Plan, size: int) -> None:
    """Raises RuntimeError unless adapters answer the same when they come back, and differ from each other."""
    count = min(max(plan.counts), 2 * plan.pool)
    workload = Workload(
        streams=plan.pool, requests=2 * count, prompt_tokens=plan.workload.prompt_tokens, new_tokens=8, adapters=count
    )
    prompt = workload.prompts(size)[0]

    class Same(Workload):
        def prompts(self, vocab_size: int) -> list[list[int]]:
            return [prompt] * self.requests

    same = Same(**asdict(workload))
    answers = [tuple(times.token_ids) for times in asyncio.run(drive(target, same, size))]
    if answers[:count] != answers[count:]:
        raise RuntimeError("adapters that were evicted and came back answer otherwise than before")
    if count > 1 and len(set(answers)) == 1:
        raise RuntimeError("all adapters answer alike")


@dataclass
class Beside:
    """What one further server shows: streams beside loads, cold adapters, folders that come by the thousand."""

    bystanders: standing_by.Latencies
    alone: ColdStart
    beside: ColdStart
    register_seconds: float
    register_bytes: int


def beside(plan: Plan, standing_rounds: int) -> Beside:
    """The server has FEW adapters of the usual rank and twice `cold` of twice the rank."""
    few = min(FEW, plan.pool)
    folder = plan.root / "beside"
    shutil.rmtree(folder, ignore_errors=True)
    for index in range(few):
        link(write_catalog(plan.base, plan.root, few, plan.rank, plan.files) / adapter_name(index), folder)
    large = write_catalog(plan.base, plan.root, 2 * plan.cold, 2 * plan.rank, plan.files)
    names = [f"large-{index}" for index in range(2 * plan.cold)]
    for index, name in enumerate(names):
        link(large / adapter_name(index), folder, name)
    guests = standing_by.Guests.write(plan.base, plan.root / "guests", plan.rank)
    options = [*plan.server_options(free_port()), guests.server_option]
    aside = set_aside(plan)
    with started(plan.model, folder, plan.root / "lorry-beside.log", options) as server:
        target, size = server.target, vocab_size(server.target)
        workload = plan.of(few, "uniform", 100)
        streams = replace(workload, requests=workload.streams, new_tokens=4 * workload.new_tokens)
        cold = replace(workload, requests=2 * plan.cold)
        nbytes = 2 * plan.adapter_bytes
        forget_pages(folder)
        alone = asyncio.run(cold_start(target, cold, names[: plan.cold], nbytes, size))
        with_streams = asyncio.run(_cold_beside(target, streams, cold, names[plan.cold :], nbytes, size))
        found = standing_by.bystanders(target, streams, size, guests, standing_rounds)
        seconds, taken = register(server, aside, folder)
    return Beside(found, alone, with_streams, seconds, taken)


async def _cold_beside(
    target: str, streams: Workload, cold: Workload, names: Sequence[str], nbytes: int, size: int
) -> ColdStart:
    async def keep_busy() -> None:
        number = 200
        while True:
            await drive(target, streams.again(number), size)
            number += 1

    background = asyncio.create_task(keep_busy())
    try:
        await asyncio.sleep(2.0)  # until they decode
        return await cold_start(target, cold.again(300), names, nbytes, size)
    finally:
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)


def link(source: Path, folder: Path, name: str = "") -> Path:
    """The same adapter in another folder, by hard links."""
    target = folder / (name or source.name)
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).hardlink_to(file)
    return target


def set_aside(plan: Plan) -> Path:
    """A folder of adapters that are to be registered; made before a server has read a file that they link to."""
    catalog = write_catalog(plan.base, plan.root, plan.register, plan.rank, plan.files)
    aside = plan.root / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    for index in range(plan.register):
        link(catalog / adapter_name(index), aside, f"new-{index}")
    return aside


def register(server: Server, aside: Path, folder: Path) -> tuple[float, int]:
    """Seconds and bytes until a running server lists all adapters that are moved into its folder."""
    with grpc.insecure_channel(server.target) as channel:
        stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
        wanted = listed(stub) + len(os.listdir(aside))
        before, begin = memory(server.pid), time.monotonic()
        for each in os.listdir(aside):
            os.rename(aside / each, folder / each)
        while listed(stub) < wanted:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
    time.sleep(1.0)  # until the frontend has them
    return seconds, memory(server.pid) - before


def listed(stub: Any) -> int:
    """How many adapters a server lists."""
    count, token = 0, ""
    while True:
        page = stub.ListAdapters(adapter_pb2.ListAdaptersRequest(page_token=token))
        count, token = count + len(page.adapters), page.next_page_token
        if not token:
            return count


def figures(results: Sequence[Registered], aside: Beside) -> dict[str, dict[str, Any]]:
    """What has a floor; the share of throughput only where both numbers of adapters were measured."""
    zipf = {result.adapters: result.median for result in results if result.popularity == "zipf"}
    measured = {
        "bystanders_p99_more": aside.bystanders.more,
        "cold_more_ms": aside.alone.more_ms,
        "cold_beside_streams_more_ms": aside.beside.more_ms,
        "register_seconds": aside.register_seconds,
        "register_bytes": aside.register_bytes,
    }
    if FEW in zipf and MANY in zipf:
        measured["many_over_few"] = zipf[MANY] / zipf[FEW]
    found = {}
    for name, value in measured.items():
        floor, sense = FLOORS[name]
        reached = value >= floor if sense == "at least" else value <= floor
        found[name] = {"measured": round(value, 4), sense: floor, "reached": reached}
    return found


def show(results: Sequence[Registered], floors: dict[str, dict[str, Any]]) -> None:
    table = Table("registered", "popularity", "tokens/s", "on the device", "hot p50", "p99", "cold p50", "p99, ms")
    for result in results:
        row = result.report()
        latencies = [row["time_to_first_token_ms"][place] for place in ("hot", "cold")]
        cells = [f"{found[p]:.0f}" if found else "" for found in latencies for p in ("p50", "p99")]
        table.add_row(str(result.adapters), result.popularity, f"{result.median:.1f}", f"{result.hit_rate:.0%}", *cells)
    console.print(table)
    for name, row in floors.items():
        sense = "at least" if "at least" in row else "at most"
        mark = "" if row["reached"] else "[red]not reached[/] "
        console.print(f"{mark}{name}: {row['measured']:g} ({sense} {row[sense]:g})", highlight=False)


def main(
    model: Annotated[str, typer.Option(help="What the servers serve.")] = DEFAULT_MODEL,
    adapters: Annotated[list[int] | None, typer.Option(help="Registered adapters; by default 1 to 2,000.")] = None,
    pool: Annotated[int, typer.Option(min=1, help="Adapters that fit on the device.")] = 16,
    rank: Annotated[int, typer.Option(min=1, max=128, help="Of the adapters, on all linears.")] = 16,
    files: Annotated[int, typer.Option(min=1, help="Different files of weights.")] = 256,
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Of one run.")] = 96,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after one that warms up; medians count.")] = 3,
    registering: Annotated[int, typer.Option(min=1, help="Adapters put into a running server's folder.")] = 2000,
    cold: Annotated[int, typer.Option(min=1, help="Adapters of twice the rank that are asked for cold.")] = 8,
    quick: Annotated[bool, typer.Option(help="One round of few requests; no figures to keep.")] = False,
    server_option: Annotated[list[str] | None, typer.Option(help='Such as "--threads=1".')] = None,
    output: Annotated[Path | None, typer.Option(help="Result; bench/results/adapters-<device>.json.")] = None,
    replot: Annotated[Path | None, typer.Option(help="Only draw the plots of a result.")] = None,
) -> None:
    """Check, measure, compare with the floors, write, draw."""
    from plots import draw

    if replot is not None:
        draw(json.loads(replot.read_text()), replot.with_suffix(".png"))
        return
    workload = Drawn(
        streams=streams,
        requests=2 * streams if quick else requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    options = server_option or ["--kv-memory=256MiB", "--adapter-host-memory=1GiB"]
    plan = Plan(
        model=model,
        root=bench_folder(),
        counts=tuple(adapters or COUNTS),
        pool=pool,
        rank=rank,
        files=files,
        options=options,
        workload=workload,
        repeats=1 if quick else repeats,
        register=registering,
        cold=cold,
    )
    results, starts = rounds(plan)
    aside = beside(plan, standing_rounds=1 if quick else 9)
    floors = figures(results, aside)
    result = {
        "workload": asdict(workload) | {"adapters": list(plan.counts), "popularity": list(get_args(Popularity))},
        "pool": pool,
        "rank": rank,
        "adapter_bytes": plan.adapter_bytes,
        "weight_files": files,
        "model": Path(model).name,
        "server_options": options,
        "machine": machine(),
        "floors": floors,
        "registered": [each.report() for each in results],
        "starts": starts,
        "bystanders": aside.bystanders.report(),
        "cold": {"alone": aside.alone.report(), "beside_streams": aside.beside.report()},
        "registering": {
            "adapters": registering,
            "seconds": round(aside.register_seconds, 3),
            "bytes": aside.register_bytes,
        },
    }
    device = "gpu" if torch.cuda.is_available() else "cpu"
    output = output or Path(__file__).parent / "results" / f"adapters-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    show(results, floors)
    draw(result, output.with_suffix(".png"))
    if not quick and not all(row["reached"] for row in floors.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
