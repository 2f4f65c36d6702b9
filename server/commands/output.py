"""What a command says when it fails: one line on stderr, exit code 1."""

from __future__ import annotations

import typer


def fail(message: str) -> typer.Exit:
    """Print `error: message` on one line of stderr; raise what this returns."""
    typer.secho(f"error: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    return typer.Exit(1)
