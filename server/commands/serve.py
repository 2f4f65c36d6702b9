"""`lorry serve`: the server, from its options."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from lorry.server.commands import config_options
from lorry.server.errors import PathRefused


def serve(**options: Any) -> None:
    """Serve a model and its adapters until SIGTERM or Drain; streams in flight finish first."""
    from lorry.server.sources.address import Allowed

    config = config_options.build(options)
    try:
        Allowed(config.engine.adapter_sources)
    except PathRefused as error:
        raise typer.BadParameter(error.message, param_hint="--adapter-source") from None
    from lorry.server.app import run

    raise typer.Exit(run(config))


serve.__signature__ = inspect.Signature(config_options.parameters())  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in config_options.parameters()}
