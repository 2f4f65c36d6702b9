"""`lorry demo`: one question to the base and to every adapter of a folder, side by side, in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.server.commands.output import fail

QUESTION = "I love sunny days at the beach, what should I take along?"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "adapters"
MOST_ADAPTERS = 7


def demo(
    question: Annotated[str, typer.Argument(help="What everyone is asked.")] = QUESTION,
    adapters: Annotated[
        Path, typer.Option("--adapters", metavar="DIR", help="A folder whose sub-folders are adapters.")
    ] = EXAMPLES,
    model: Annotated[str | None, typer.Option(help="Another base.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-m", help="Most tokens an answer.")] = 48,
) -> None:
    """Start a server, ask the base and its adapters the same question, and show the answers as they come."""
    if not adapters.is_dir():
        raise fail(f"no folder {adapters}; name one with --adapters, or run this in a clone of the repository")
    names = sorted(path.name for path in adapters.iterdir() if (path / "adapter_config.json").is_file())
    if not names:
        raise fail(f"no adapters in {adapters}")
    import asyncio

    from lorry.server.commands.demo_run import DemoFailed, run

    try:
        asyncio.run(run(question, adapters, names[:MOST_ADAPTERS], model, max_new_tokens))
    except DemoFailed as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
