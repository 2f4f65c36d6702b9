"""`lorry adapters check`: whether adapter folders would be served, without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.server.commands.output import fail
from lorry.server.config import DEFAULT_MODEL, AdapterDtypeChoice

if TYPE_CHECKING:
    from lorry.server.model.adapter_check import Report

_SHORT = 12  # digits of a hash


def check(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Adapter folders as PEFT saves them.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The base: the default's name, a model folder, a .gguf file, a hub id.")
    ] = DEFAULT_MODEL,
    adapter_dtype: Annotated[
        AdapterDtypeChoice, typer.Option(help="As of lorry serve; what 8 bits cost is said too.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Load adapters as a server would, compare a few linears with PEFT's mathematics, and report.

    Exit code 1 when any is refused. No server is needed.
    """
    from lorry.server.errors import LorryError
    from lorry.server.model.adapter_check import AdapterCheck

    refused = False
    try:
        base = AdapterCheck(model)
        for folder in folders:
            report = base.report(folder.absolute(), adapter_dtype)
            refused |= report.refused
            typer.echo(json.dumps(report.as_json()) if as_json else "\n".join(_lines(str(folder), report, model)))
    except (LorryError, OSError) as error:
        raise fail(str(error)) from None
    if refused:
        raise typer.Exit(1)


def _lines(name: str, report: Report, model: str) -> Iterator[str]:
    yield f"{name}: {'refused' if report.refused else 'ok'}"
    if (error := report.error) is not None:
        field = f" ({error.field})" if error.field and error.field not in error.message else ""
        yield f"  why       {error.message}{field}"
    for title, text in (
        ("methods", ", ".join(report.methods)),
        ("modules", _modules(report.modules)),
        ("rank", _counted(report.ranks)),
        ("scaling", _counted(report.scalings)),
        ("size", f"{report.bytes / 1e6:.2f} MB, {report.pages} pages of 16 ranks" if report.bytes else ""),
        ("base", _base(report, model)),
        ("probe", _probe(report)),
        ("8 bits", _rounding(report)),
        ("revision", report.revision),
    ):
        if text:
            yield f"  {title:<9} {text}"
    for warning in report.warnings:
        yield f"  warning   {warning}"


_ENDS = (-1,)  # what `Report.modules` has of the embedding and the head


def _modules(modules: dict[str, list[int]]) -> str:
    """Sites that share their layers together: `q_proj, v_proj × 30 layers; lm_head (61 linears)`."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for site, layers in modules.items():
        groups.setdefault(tuple(layers), []).append(site)
    times = {layers: "" if layers == _ENDS else f" × {len(layers)} layers" for layers in groups}
    parts = [", ".join(sites) + times[layers] for layers, sites in groups.items()]
    count = sum(len(layers) for layers in modules.values())
    return "; ".join(parts) + f" ({count} linears)" if parts else ""


def _counted(values: dict[int, int] | dict[float, int]) -> str:
    """`8`, or `4 (29 linears), 8 (31 linears)` where they differ."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({count} linears)" for value, count in values.items())


def _base(report: Report, model: str) -> str:
    named = ascii(report.base_named)[1:-1] or "unnamed"
    if not report.fingerprint:
        return f"{named}, without a fingerprint" if report.revision else ""
    theirs, ours = report.fingerprint[:_SHORT], report.base_fingerprint[:_SHORT]
    if not ours:
        return named
    return f"{named}, fingerprint {ascii(theirs)[1:-1]} {'is' if theirs == ours else 'is not'} that of {model} ({ours})"


def _probe(report: Report) -> str:
    if (probe := report.probe) is None:
        return "" if report.refused else f"no reference for {', '.join(report.methods)}"
    errors = f"error at most {probe.max_error:.1e}, RMS {probe.rms_error:.1e} of the reference"
    return f"{len(probe.linears)} linears, {errors}"


def _rounding(report: Report) -> str:
    if (cost := report.rounding) is None:
        return ""
    return f"updates off by {cost.error:.1e} (RMS, of the update), at most {cost.worst:.1e} in {cost.worst_linear}"
