"""What the benchmarks of a GPU share as commands: where they run, what of them fails, goals, versions, the result."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from gpu.measure import Figure, Limits, Wrong, describe_device
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 8.5 * 60  # after which no case is begun
PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft")

console = Console()
Failures = dict[str, str]
Subject = TypeVar("Subject")


def need_gpu(program: str, dry_run: bool) -> None:
    """To be called before any kernel is imported: a dry run hides the GPU, and Triton interprets; without one it is all
    there is, exit code 2 says so."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["HF_HUB_OFFLINE"] = "1"  # bitsandbytes would look for a CPU kernel there
    elif not torch.cuda.is_available():
        console.print(f"{program} needs an NVIDIA GPU; this machine has none. --dry-run does without one.")
        raise typer.Exit(2)


def device_of(dry_run: bool) -> dict[str, Any]:
    return {"name": "none: dry run"} if dry_run else describe_device()


def run(
    subject: Subject,
    chosen: Mapping[str, Callable[[Subject], Iterator[Figure]]],
    failures: Failures,
    *,
    dry: bool = False,
    seconds: float = SECONDS,
) -> list[Figure]:
    """All figures of the cases that ran to their end, each begun within `seconds`; why the others did not."""
    begin, figures = time.monotonic(), list[Figure]()
    for name, case in chosen.items():
        if time.monotonic() - begin > seconds:
            failures[name] = "not begun: the time is over"
            continue
        try:
            found = list(case(subject))
        except Wrong as error:
            failures[name] = f"wrong: {error}"
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
        else:
            figures += found
            console.print(f"[green]{name}[/]: right" + ("" if dry else f", {len(found)} figures"))
        if name in failures:
            console.print(f"[red]{name}[/]: {failures[name]}", highlight=False)
        if not dry:
            torch.cuda.empty_cache()
    return figures


def print_limits(device: Mapping[str, Any], limits: Limits) -> None:
    console.print(
        f"{device['name']}: copy {limits.copy / 1e9:.0f} GB/s, bf16 product {limits.cublas / 1e12:.0f} TFLOP/s"
    )


def print_goals(goals: list[dict[str, Any]]) -> None:
    table = Table("goal", "floor", "aim", "measured", "reached")
    for goal in goals:
        colour = {"aim": "green", "floor": "yellow", "below the floor": "red"}.get(goal["reached"], "dim")
        table.add_row(goal["goal"], goal["floor"], goal["aim"], goal["shown"], f"[{colour}]{goal['reached']}[/]")
    console.print(table)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def default_output(program: str, device_name: str) -> Path:
    return RESULTS / f"{program}-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def finish(
    program: str,
    output: Path | None,
    device: dict[str, Any],
    limits: Limits | None,
    goals: list[dict[str, Any]],
    failures: Failures,
    **more: Any,
) -> None:
    """Print the goals, write the result (a dry run's only where `output` says), say what failed; exit code 1 for a
    failure or a goal below its floor."""
    print_goals(goals)
    result = {
        "device": device,
        "versions": versions(),
        "limits": None
        if limits is None
        else {"copy_gb_s": limits.copy / 1e9, "cublas_bf16_tflop_s": limits.cublas / 1e12},
        "goals": goals,
        "failures": failures,
        **more,
    }
    target = output if output is not None or limits is None else default_output(program, device["name"])
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {target}")
    for name, reason in failures.items():
        console.print(f"[red]{name}[/]: {reason}", highlight=False)
    if failures or any(goal["reached"] == "below the floor" for goal in goals):
        raise typer.Exit(1)
