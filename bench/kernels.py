"""Times the GPU kernels against this GPU's own limits and against their peers, after proving them right.

    python bench/kernels.py [--output bench/results/kernels-<device>.json] [--only nf4 --only attention] [--quick]
    python bench/kernels.py --dry-run          # without a GPU: every case once, in tiny shapes, nothing timed

A figure is the median over replays of a CUDA graph whose calls rotate through three times the L2 cache. GB/s stand
beside the copy bandwidth of the same run, TFLOP/s beside its bf16 product by cuBLAS, peers' times beside ours. A kernel
whose answer is wrong gets no figure. Exits with 1 if one is wrong, failed or is below its floor, with 2 without a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu.goals import evaluate
from gpu.measure import Case, Limits, Stage, Wrong, describe_device, measure_limits
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
OPERATIONS = ("linear", "lora", "attention", "elementwise", "sampling")
SECONDS = 8.5 * 60  # after which no case is begun

console = Console()
Failures = dict[str, str]


def cases(only: list[str], failures: Failures) -> dict[str, Case]:
    """Those whose name holds one of `only`; an operation that cannot be imported is a failure, not the end."""
    found: dict[str, Case] = {}
    for operation in OPERATIONS:
        try:
            found |= importlib.import_module(f"gpu.{operation}").CASES
        except Exception as error:
            failures[operation] = f"{type(error).__name__}: {error}"
    return {name: case for name, case in found.items() if not only or any(part in name for part in only)}


def run(stage: Stage, chosen: dict[str, Case], limits: Limits | None, failures: Failures) -> list[dict[str, Any]]:
    """Reports of all figures of the cases that ran to their end."""
    begin, rows = time.monotonic(), []
    for name, case in chosen.items():
        if time.monotonic() - begin > SECONDS:
            failures[name] = "not begun: the time is over"
            continue
        try:
            reports = [figure.report(limits) for figure in case(stage)]
        except Wrong as error:
            failures[name] = f"wrong: {error}"
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
        else:
            rows += reports
            console.print(f"[green]{name}[/]: right" + ("" if limits is None else f", {len(reports)} figures"))
        if name in failures:
            console.print(f"[red]{name}[/]: {failures[name]}", highlight=False)
        if not stage.dry:
            torch.cuda.empty_cache()
    return rows


def print_figures(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "operation", "shape", "rows", "plan", "µs", "GB/s", "of copy", "TFLOP/s", "of cuBLAS", "against peers"
    )
    for row in rows:
        peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.get("faster_than", {}).items())
        work = (f"{row['tflop_s']:.0f}", f"{row['of_cublas']:.0%}") if "tflop_s" in row else ("", "")
        table.add_row(
            row["op"], row["shape"], str(row["rows"]), row["plan"], f"{row['microseconds']:.1f}",
            f"{row['gb_s']:.0f}", f"{row['of_copy']:.0%}", *work, peers,
        )  # fmt: skip
    console.print(table)


def print_goals(goals: list[dict[str, Any]]) -> None:
    table = Table("goal", "floor", "aim", "measured", "reached")
    for goal in goals:
        colour = {"aim": "green", "floor": "yellow", "below the floor": "red"}.get(goal["reached"], "dim")
        table.add_row(goal["goal"], goal["floor"], goal["aim"], goal["shown"], f"[{colour}]{goal['reached']}[/]")
    console.print(table)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def default_output(device_name: str) -> Path:
    return RESULTS / f"kernels-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def main(
    output: Annotated[Path | None, typer.Option(help="Result file; bench/results/kernels-<device>.json.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name holds this; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Few rows and few rounds.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Tiny shapes in Triton's interpreter; nothing is timed.")] = False,
) -> None:
    """Check, time, compare, write."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["HF_HUB_OFFLINE"] = "1"  # bitsandbytes would look for a CPU kernel there
    elif not torch.cuda.is_available():
        console.print("bench/kernels.py needs an NVIDIA GPU; this machine has none. --dry-run does without one.")
        raise typer.Exit(2)
    torch.manual_seed(0)
    failures: Failures = {}
    chosen = cases(only or [], failures)
    if not chosen and not failures:
        raise typer.BadParameter(f"no case holds any of {only}", param_hint="--only")
    stage = Stage("cpu" if dry_run else "cuda", dry_run, quick)
    device = {"name": "none: dry run"} if dry_run else describe_device()
    limits = measure_limits(stage)
    if limits is not None:
        console.print(
            f"{device['name']}: copy {limits.copy / 1e9:.0f} GB/s, bf16 product {limits.cublas / 1e12:.0f} TFLOP/s"
        )
    rows = run(stage, chosen, limits, failures)
    if limits is not None and rows:
        print_figures(rows)
    goals = evaluate(rows)
    print_goals(goals)
    result = {
        "device": device,
        "versions": versions(),
        "limits": None
        if limits is None
        else {"copy_gb_s": limits.copy / 1e9, "cublas_bf16_tflop_s": limits.cublas / 1e12},
        "quick": quick,
        "goals": goals,
        "failures": failures,
        "figures": rows,
    }
    target = output if output is not None or dry_run else default_output(device["name"])
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {target}")
    for name, reason in failures.items():
        console.print(f"[red]{name}[/]: {reason}", highlight=False)
    if failures or any(goal["reached"] == "below the floor" for goal in goals):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
