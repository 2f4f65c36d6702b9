"""Measure a Lorry server over gRPC: tokens per second, time to first token, inter-token latency.

python bench/serve.py --streams 16 --adapters 8            # starts a server of its own
python bench/serve.py --target 127.0.0.1:50051 --rate 4    # a running one, Poisson arrivals
python bench/serve.py --bystanders --streams 16 --new-tokens 400        # latency while other adapters load

A model of random weights: --model examples/configs/llama-3-8b --server-option=--load-format=dummy
"""

from __future__ import annotations

import asyncio
import json
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import bystanders as standing_by
import grpc
import torch
import typer
from gpu.command import versions
from gpu.measure import describe_device
from load import Report, RequestTimes, drive, summarize
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from server_process import lorry_server
from workload import Popularity, Workload, bench_folder, write_adapters

from lorry.server.config import DEFAULT_MODEL
from lorry.server.model.store import resolve_model
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
    bystanders: Annotated[
        bool,
        typer.Option(help="Latency of the streams while other adapters load, against the same without."),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write all runs as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all runs as JSON.")] = False,
    server_option: Annotated[
        list[str] | None, typer.Option(help='Further option of a started server, such as "--threads=1".')
    ] = None,
) -> None:
    """Run one workload against a server and report its speed."""
    if target and server_option:
        raise typer.BadParameter("a running server takes no --server-option")
    if target and bystanders:
        raise typer.BadParameter("--bystanders needs a server of its own, whose folders of adapters it knows")
    if bystanders and (rate or requests):
        raise typer.BadParameter("--bystanders are streams that begin together: no --rate, no --requests")
    workload = Workload(
        streams=streams,
        requests=requests or (1 if bystanders else 2) * streams,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        adapters=adapters,
        popularity=popularity,
        rate=rate,
        seed=seed,
    )
    root, options = bench_folder(), server_option or []
    result: dict[str, Any] = {"workload": asdict(workload)}
    if not target:
        result |= {"model": Path(model).name, "server_options": list(options), "machine": machine()}
    guests = standing_by.Guests.write(resolve_model(model), root / "guests", rank) if bystanders else None
    if guests is not None:
        options = [*options, guests.server_option]
    with nullcontext(target) if target else _own(model, root, adapters, rank, options) as address:
        if guests is not None:
            found = standing_by.bystanders(address, workload, vocab_size(address), guests, repeats)
            result["bystanders"], shown = found.report(), standing_by.show(found)
        else:
            measure(address, workload, "warming up")
            runs = [measure(address, workload.again(i + 1), f"run {i + 1} of {repeats}") for i in range(repeats)]
            reports = sorted(map(summarize, runs), key=lambda report: report.output_tokens_per_second)
            result["runs"], shown = [asdict(report) for report in reports], show(reports[len(reports) // 2])
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        Console().print(shown)


def machine() -> dict[str, Any]:
    """What the figures of a server that was started here depend on."""
    device = describe_device() if torch.cuda.is_available() else {"name": platform.processor() or platform.machine()}
    return {"device": device, "versions": versions()}


def _own(model: str, root: Path, adapters: int, rank: int, options: list[str]) -> AbstractContextManager[str]:
    folder = write_adapters(resolve_model(model), root, adapters, rank)
    folder.mkdir(parents=True, exist_ok=True)
    return lorry_server(model, folder, root / "lorry.log", options)


if __name__ == "__main__":
    typer.run(main)
