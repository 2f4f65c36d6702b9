"""Measure a Lorry server over gRPC: tokens per second, time to first token, inter-token latency.

python bench/serve.py --streams 16 --adapters 8            # starts a server of its own
python bench/serve.py --target 127.0.0.1:50051 --rate 4    # a running one, Poisson arrivals
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import grpc
import typer
from load import Report, RequestTimes, drive, summarize
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from server_process import lorry_server
from workload import Popularity, Workload, bench_folder, export_base, write_adapters

from lorry.server.config import DEFAULT_MODEL
from lorry.v1 import control_pb2, control_pb2_grpc

errors = Console(stderr=True)


def vocab_size(target: str) -> int:
    """Of the model that the server serves."""
    with grpc.insecure_channel(target) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        return int(stub.GetModelInfo(control_pb2.GetModelInfoRequest()).vocab_size)


def measure(target: str, workload: Workload, title: str = "") -> list[RequestTimes]:
    """The times of one run, with a progress bar on stderr."""
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task(title or f"{workload.streams} streams", total=workload.requests)
        return asyncio.run(drive(target, workload, vocab_size(target), lambda: progress.advance(task)))


def show(report: Report) -> Table:
    """The report as a table."""
    table = Table(
        title=f"{report.output_tokens_per_second:.1f} output tokens/s · {report.requests} requests "
        f"· {report.output_tokens} tokens in {report.seconds:.2f} s"
    )
    for column in ("ms", *report.request_latency_ms):
        table.add_column(column, justify="right")
    for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency_ms"):
        values = getattr(report, name).values()
        table.add_row(name.removesuffix("_ms").replace("_", " "), *(f"{value:.1f}" for value in values))
    return table


def main(
    target: Annotated[str | None, typer.Option(help="Address of a running server; unset: one is started.")] = None,
    model: Annotated[str, typer.Option(help="What a started server serves.")] = DEFAULT_MODEL,
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 16,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests in all; unset: twice the streams.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Random tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens of each answer.")] = 64,
    adapters: Annotated[int, typer.Option(min=0, help="Different adapters; 0: the base.")] = 0,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of the random adapters.")] = 16,
    popularity: Annotated[Popularity, typer.Option(help="How often each adapter is asked for.")] = "uniform",
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals per second; unset: closed loop.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, adapters and arrivals.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs after one that warms up; the median is shown.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Write all runs as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all runs as JSON.")] = False,
    server_option: Annotated[
        list[str] | None, typer.Option(help='Further option of a started server, such as "--threads=1".')
    ] = None,
) -> None:
    """Run one workload against a server and report its speed."""
    if target and server_option:
        raise typer.BadParameter("a running server takes no --server-option")
    workload = Workload(
        streams=streams,
        requests=requests or 2 * streams,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        adapters=adapters,
        popularity=popularity,
        rate=rate,
        seed=seed,
    )
    root = bench_folder()
    with nullcontext(target) if target else _own(model, root, adapters, rank, server_option or []) as address:
        measure(address, workload, "warming up")
        runs = [measure(address, workload.again(i + 1), f"run {i + 1} of {repeats}") for i in range(repeats)]
    reports = sorted(map(summarize, runs), key=lambda report: report.output_tokens_per_second)
    result = {"workload": asdict(workload), "runs": [asdict(report) for report in reports]}
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        Console().print(show(reports[len(reports) // 2]))


def _own(model: str, root: Path, adapters: int, rank: int, options: list[str]) -> AbstractContextManager[str]:
    folder = write_adapters(export_base(model, root), root, adapters, rank)
    folder.mkdir(parents=True, exist_ok=True)
    return lorry_server(model, folder, root / "lorry.log", options)


if __name__ == "__main__":
    typer.run(main)
