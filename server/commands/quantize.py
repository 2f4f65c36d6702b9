"""`lorry quantize`: a checkpoint in NF4, for Lorry, transformers and bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.server.commands.output import fail


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A folder of Hugging Face safetensors, a .gguf file, or the default's name."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not be there yet.")],
) -> None:
    """Write a model as an NF4 checkpoint in the bitsandbytes 4-bit format."""
    if target.exists():
        raise fail(f"{target} is there already")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lorry.server.errors import LorryError
    from lorry.server.model.load import quantize_checkpoint

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        try:
            quantize_checkpoint(source, target, progress=progress)
        except (LorryError, OSError) as error:
            raise fail(str(error)) from None
    size = sum(path.stat().st_size for path in target.iterdir())
    typer.echo(f"wrote {target}: {size / 1e6:.1f} MB")
