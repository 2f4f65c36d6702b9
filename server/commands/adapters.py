"""`lorry adapters`: the adapters of a running server, and folders checked without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.server.commands.check import check
from lorry.server.commands.client import DEFAULT_SERVER, Server, connect

if TYPE_CHECKING:
    import grpc

    from lorry.v1 import adapter_pb2

app = typer.Typer(
    help="List, load, unload and pin the adapters of a running server; check folders.", no_args_is_help=True
)
app.command("check")(check)

Id = Annotated[str, typer.Argument(help="The adapter's id.")]


def _stub(channel: grpc.Channel) -> Any:
    from lorry.v1 import adapter_pb2_grpc

    return adapter_pb2_grpc.AdapterServiceStub(channel)


def _all(channel: grpc.Channel) -> Iterator[adapter_pb2.Adapter]:
    from lorry.v1 import adapter_pb2

    token = ""
    while True:
        page = _stub(channel).ListAdapters(adapter_pb2.ListAdaptersRequest(page_token=token), timeout=30)
        yield from page.adapters
        token = page.next_page_token
        if not token:
            return


def _state(adapter: adapter_pb2.Adapter) -> str:
    from lorry.v1 import adapter_pb2

    return adapter_pb2.AdapterState.Name(adapter.state).removeprefix("ADAPTER_STATE_").lower()


def _line(adapter: adapter_pb2.Adapter) -> str:
    pinned = ", pinned" if adapter.pinned else ""
    read = f", rank {adapter.rank}, revision {adapter.revision[:12]}" if adapter.revision else ""
    return f"{adapter.id}: {_state(adapter)}{pinned}{read}"


@app.command("list")
def list_adapters(
    server: Server = DEFAULT_SERVER,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the adapters that the server knows."""
    with connect(server) as channel:
        adapters = list(_all(channel))
    if as_json:
        from google.protobuf import json_format

        for adapter in adapters:
            fields = json_format.MessageToDict(adapter, preserving_proto_field_name=True)
            typer.echo(json.dumps(fields, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, justify in (("id", "left"), ("state", "left"), ("rank", "right"), ("kB", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("in use", justify="right")
    for title in ("revision", "layers"):
        table.add_column(title)
    for adapter in adapters:
        table.add_row(
            adapter.id,
            _state(adapter) + (" (pinned)" if adapter.pinned else ""),
            str(adapter.rank or ""),
            str(adapter.bytes // 1000 or ""),
            str(adapter.in_flight or ""),
            adapter.revision[:12],
            adapter.error or " ".join(adapter.target_modules),
        )
    Console().print(table)


@app.command("load")
def load(
    id: Annotated[str, typer.Argument(help="The id that requests will use.")],
    path: Annotated[
        str,
        typer.Argument(
            help="The PEFT folder below one of the server's adapter roots, or an address that it allows: hf://org/name."
        ),
    ],
    server: Server = DEFAULT_SERVER,
    revision: Annotated[
        str | None, typer.Option(help="Refuse another revision than this one.", show_default=False)
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Hold it on the device.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of one with this id.")] = False,
) -> None:
    """Load an adapter; returns when it is on the device."""
    from lorry.v1 import adapter_pb2

    request = adapter_pb2.LoadAdapterRequest(id=id, path=path, expected_revision=revision, pin=pin, replace=replace)
    with connect(server) as channel:
        typer.echo(_line(_stub(channel).LoadAdapter(request).adapter))


@app.command("unload")
def unload(id: Id, server: Server = DEFAULT_SERVER) -> None:
    """Forget an adapter; requests in flight finish."""
    from lorry.v1 import adapter_pb2

    with connect(server) as channel:
        answer = _stub(channel).UnloadAdapter(adapter_pb2.UnloadAdapterRequest(id=id), timeout=30)
    typer.echo(_line(answer.adapter))


@app.command("pin")
def pin(
    id: Id,
    server: Server = DEFAULT_SERVER,
    off: Annotated[bool, typer.Option("--off", help="Hold it no longer.")] = False,
) -> None:
    """Hold an adapter on the device."""
    from lorry.v1 import adapter_pb2

    request = adapter_pb2.UpdateAdapterRequest(id=id, pinned=not off)
    with connect(server) as channel:
        typer.echo(_line(_stub(channel).UpdateAdapter(request).adapter))
