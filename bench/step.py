"""Times whole steps of a Llama-3-8B with random weights on a GPU, by the engine that serves, checked first.

    python bench/step.py [--output bench/results/step-<device>.json] [--only decode --only prefill] [--quick]
    python bench/step.py --dry-run             # without a GPU: every case once, a tiny model on the CPU, nothing timed

Decode steps are wall clock of the real loop in steady state: requests with adapters, scheduler, one step ahead, graphs,
tokens chosen on the device. Beside each stands its bytes bound: what must be read, at the copy bandwidth of the same
run. Answers are compared first (graphs against single launches against a row alone); a case whose answers are wrong has
no figure. Peers run on the same shape when the engine is gone, those that can be imported. Exits with 1 if a case is
wrong, failed or below its floor, with 2 without a GPU.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu.command import SECONDS, Failures, console, device_of, finish, need_gpu, print_limits, run
from gpu.goals import evaluate
from gpu.measure import Figure, Stage, measure_limits
from rich.table import Table

Cases = dict[str, Callable[[Any], Iterator[Figure]]]


def own_cases(batches: tuple[int, ...]) -> Cases:
    """In the order in which they run; the last one changes the process."""
    from steps import bystanders, decode, idle, prefill

    return {
        **decode.cases(batches[:-1]),
        "bystanders": bystanders.bystanders,
        "prefill": prefill.prefill,
        **decode.cases(batches[-1:]),
        "step apart": idle.idle,
    }


def chosen(cases: Cases, only: list[str]) -> Cases:
    return {name: case for name, case in cases.items() if not only or any(part in name for part in only)}


def measure(stage: Stage, only: list[str], failures: Failures, left_out: Failures) -> list[Figure]:
    """All figures. What keeps the engine from being built is a failure; a peer that cannot run is left out."""
    from steps import peers
    from steps.sizes import TINY, sizes_of

    end = time.monotonic() + SECONDS
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="lorry-step-") as name:
        tiny = Path(name) / "tiny"
        tiny.mkdir()
        (tiny / "config.json").write_text(json.dumps(TINY))
        sizes = sizes_of(stage, tiny)
        own, others = chosen(own_cases(sizes.batches), only), chosen(dict(peers.CASES), only)
        if not own and not others:
            raise typer.BadParameter(f"no case holds any of {only}", param_hint="--only")
        if own:
            figures = measure_own(stage, sizes, Path(name), own, end, failures, left_out)
        rivals = peers.Rivals(stage, sizes, figures)
        figures += run(rivals, others, left_out, dry=stage.dry, seconds=end - time.monotonic())
    return figures


def measure_own(
    stage: Stage, sizes: Any, folder: Path, cases: Cases, end: float, failures: Failures, left_out: Failures
) -> list[Figure]:
    """Those of our cases, by an engine that is gone afterwards."""
    from steps.session import Session

    try:
        session = Session(stage, sizes, folder)
    except Exception as error:
        failures["engine"] = f"{type(error).__name__}: {error}"
        return []
    left_out |= {f"decode, {rows} rows": why for rows, why in session.left_out.items()}
    there = {name: case for name, case in cases.items() if name not in left_out}
    try:
        return run(session, there, failures, dry=stage.dry, seconds=end - time.monotonic())
    finally:
        session.close()


def report(figures: list[Figure], limits: Any) -> list[dict[str, Any]]:
    """Rows for the result, with tokens per second of those that make some."""
    rows = []
    for figure in figures:
        row = figure.report(limits)
        if figure.seconds and figure.op in ("decode", "prefill"):
            row["tokens_s"] = figure.rows / figure.seconds
        rows.append(row)
    return rows


def print_figures(rows: list[dict[str, Any]]) -> None:
    table = Table("case", "adapters", "rows", "ms", "tokens/s", "over bytes bound", "of cuBLAS", "parts, ms", "peers")
    for row in rows:
        bound, cublas = row.get("times_bytes_bound"), row.get("of_cublas")
        parts = {name: value for name, value in row.get("parts", {}).items() if value is not None}
        table.add_row(
            row["op"],
            row["shape"] + (f" ({row['plan']})" if row["plan"] else ""),
            str(row["rows"]),
            f"{row['microseconds'] / 1e3:.2f}",
            f"{row['tokens_s']:.0f}" if "tokens_s" in row else "",
            f"{bound:.2f}x" if bound and row["op"] == "decode" else "",
            f"{cublas:.0%}" if cublas else "",
            ", ".join(f"{name} {value / 1e3:.2f}" for name, value in parts.items()),
            ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.get("faster_than", {}).items()),
        )
    console.print(table)


def main(
    output: Annotated[Path | None, typer.Option(help="Result file; bench/results/step-<device>.json.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name holds this; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Few batches, few steps, one round.")] = False,
    dry_run: Annotated[bool, typer.Option(help="A tiny model on the CPU; nothing is timed.")] = False,
) -> None:
    """Check, time, compare, write."""
    need_gpu("bench/step.py", dry_run)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    from steps.goals import GOALS

    torch.manual_seed(0)
    if not dry_run:
        from lorry.kernels.triton.compilations import keep_in
        from lorry.server.model.store import cache_root

        keep_in(cache_root("triton"))  # as the engine's process does
    stage = Stage("cpu" if dry_run else "cuda", dry_run, quick)
    device = device_of(dry_run)
    limits = measure_limits(stage)
    if limits is not None:
        print_limits(device, limits)
        torch.cuda.empty_cache()
    failures: Failures = {}
    left_out: Failures = {}
    rows = report(measure(stage, only or [], failures, left_out), limits)
    if limits is not None and rows:
        print_figures(rows)
    for name, reason in left_out.items():
        console.print(f"[yellow]left out: {name}[/]: {reason}", highlight=False)
    goals = evaluate(rows, GOALS)
    finish("step", output, device, limits, goals, failures, quick=quick, left_out=left_out, figures=rows)


if __name__ == "__main__":
    typer.run(main)
