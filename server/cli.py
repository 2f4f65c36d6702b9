"""`lorry`: the command line. Commands load what they need when they run, so that `--help` is quick.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

import lorry
from lorry.server.commands import adapters, chat, demo, generate, quantize, score, serve

app = typer.Typer(
    name="lorry",
    help="Many LoRA adapters on one NF4-quantized language model, served over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorry {lorry.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Many LoRA adapters on one NF4-quantized language model, served over gRPC."""


app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("score")(score.score)
app.command("chat")(chat.chat)
app.add_typer(adapters.app, name="adapters")
app.command("quantize")(quantize.quantize)
app.command("demo")(demo.demo)


if __name__ == "__main__":
    app()
