"""`lorry chat`: a conversation with a running server."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.server.commands import request_options as options
from lorry.server.commands import request_spec
from lorry.server.commands.client import DEFAULT_SERVER, Server, connect, describe

if TYPE_CHECKING:
    import grpc


_HELP = "/adapter [ID[=WEIGHT] …] changes adapters, /reset forgets the conversation, /quit or end of input leaves"


def chat(
    server: Server = DEFAULT_SERVER,
    adapter: options.Adapters = None,
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    repetition_penalty: options.RepetitionPenalty = None,
    max_new_tokens: options.MaxNewTokens = 512,
    speculation: options.Speculation = None,
) -> None:
    """Talk with a running server; the interrupt key ends an answer, end of input the conversation."""
    conversation = _Conversation(
        adapter,
        system,
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "repetition_penalty": repetition_penalty,
            "max_new_tokens": max_new_tokens,
            "speculation": speculation,
        },
    )
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    with connect(server) as channel:
        _greet(channel)
        while (line := _read()) is not None:
            if line.startswith("/"):
                if not conversation.command(line):
                    return
            elif line:
                conversation.turn(channel, line)


def _greet(channel: grpc.Channel) -> None:
    from lorry.v1 import control_pb2, control_pb2_grpc

    stub: Any = control_pb2_grpc.ControlServiceStub(channel)
    model = stub.GetModelInfo(control_pb2.GetModelInfoRequest(), timeout=10)
    typer.secho(f"{model.name}, {model.context_length} tokens of context. {_HELP}.", dim=True, err=True)


def _read() -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class _Conversation:
    """The messages so far; a turn that fails or is interrupted before it said anything leaves no trace."""

    def __init__(self, adapters: list[str] | None, system: str | None, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._system = system
        self._messages: list[tuple[str, str]] = []
        self._spec = request_spec.spec(adapters, **settings)

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        name, *words = line.split()
        if name in ("/quit", "/exit"):
            return False
        if name == "/adapter":
            try:
                self._spec = request_spec.spec(words, **self._settings)
            except typer.BadParameter as error:
                typer.secho(error.message, fg=typer.colors.RED, err=True)
        elif name == "/reset":
            self._messages.clear()
        else:
            typer.secho(f"unknown command {name}. {_HELP}.", dim=True, err=True)
        return True

    def turn(self, channel: grpc.Channel, text: str) -> None:
        """Send the user's message and print the answer as it comes."""
        import grpc

        self._messages.append(("user", text))
        pieces: list[str] = []
        call = self._call(channel)
        try:
            for event in call:
                if event.HasField("delta"):
                    pieces.append(event.delta.text)
                    typer.echo(event.delta.text, nl=False)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            call.cancel()
        except grpc.RpcError as error:
            typer.secho(f"error: {describe(error)}", fg=typer.colors.RED, err=True, nl=False)
        typer.echo()
        if pieces:
            self._messages.append(("assistant", "".join(pieces)))
        else:
            self._messages.pop()

    def _call(self, channel: grpc.Channel) -> Any:
        from lorry.v1 import generation_pb2, generation_pb2_grpc

        spec = generation_pb2.GenerationSpec()
        spec.CopyFrom(self._spec)
        if self._system is not None:
            spec.chat.messages.add(role="system", content=self._system)
        for role, content in self._messages:
            spec.chat.messages.add(role=role, content=content)
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
        return stub.GenerateStream(generation_pb2.GenerateStreamRequest(spec=spec))
