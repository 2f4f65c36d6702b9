"""`lorry serve`: the server, from its options."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from lorry.server.commands import config_options


def serve(**options: Any) -> None:
    """Serve a model and its adapters until SIGTERM or Drain; streams in flight finish first."""
    from lorry.server.app import run

    raise typer.Exit(run(config_options.build(options)))


serve.__signature__ = inspect.Signature(config_options.parameters())  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in config_options.parameters()}
