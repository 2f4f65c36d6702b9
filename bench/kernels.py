"""Times the GPU kernels against this GPU's own limits and against their peers, after proving them right.

    python bench/kernels.py [--output bench/results/kernels-<device>.json] [--only nf4 --only attention] [--quick]
    python bench/kernels.py --dry-run          # without a GPU: every case once, in tiny shapes, nothing timed

A figure is the median over replays of a CUDA graph whose calls rotate through three times the L2 cache. GB/s stand
beside the copy bandwidth of the same run, TFLOP/s beside its bf16 product by cuBLAS, peers' times beside ours. A kernel
whose answer is wrong gets no figure. Exits with 1 if one is wrong, failed or is below its floor, with 2 without a GPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu.command import Failures, console, device_of, finish, need_gpu, print_limits, run
from gpu.goals import evaluate
from gpu.measure import Case, Stage, measure_limits
from rich.table import Table

OPERATIONS = ("linear", "lora", "attention", "elementwise", "sampling")


def cases(only: list[str], failures: Failures) -> dict[str, Case]:
    """Those whose name holds one of `only`; an operation that cannot be imported is a failure, not the end."""
    found: dict[str, Case] = {}
    for operation in OPERATIONS:
        try:
            found |= importlib.import_module(f"gpu.{operation}").CASES
        except Exception as error:
            failures[operation] = f"{type(error).__name__}: {error}"
    return {name: case for name, case in found.items() if not only or any(part in name for part in only)}


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


def main(
    output: Annotated[Path | None, typer.Option(help="Result file; bench/results/kernels-<device>.json.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name holds this; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Few rows and few rounds.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Tiny shapes in Triton's interpreter; nothing is timed.")] = False,
) -> None:
    """Check, time, compare, write."""
    need_gpu("bench/kernels.py", dry_run)
    torch.manual_seed(0)
    failures: Failures = {}
    chosen = cases(only or [], failures)
    if not chosen and not failures:
        raise typer.BadParameter(f"no case holds any of {only}", param_hint="--only")
    stage = Stage("cpu" if dry_run else "cuda", dry_run, quick)
    device = device_of(dry_run)
    limits = measure_limits(stage)
    if limits is not None:
        print_limits(device, limits)
    rows = [figure.report(limits) for figure in run(stage, chosen, failures, dry=dry_run)]
    if limits is not None and rows:
        print_figures(rows)
    finish("kernels", output, device, limits, evaluate(rows), failures, quick=quick, figures=rows)


if __name__ == "__main__":
    typer.run(main)
