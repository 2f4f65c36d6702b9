"""The client side of the command line: a channel, and errors as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.server.commands.output import fail

if TYPE_CHECKING:
    import grpc

INTERRUPTED = 130

Server = Annotated[str, typer.Option("--server", "-s", metavar="HOST:PORT", help="The server to ask.")]
DEFAULT_SERVER = "127.0.0.1:50051"


def describe(error: Any) -> str:
    """`NOT_FOUND: no adapter 'x'`, with what its details add: how soon to try again.

    `error`: a grpc.RpcError that ended a call, of either of grpc's APIs.
    """
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    if not hasattr(error, "trailing_metadata"):
        return str(error)
    line = f"{error.code().name}: {error.details()}"
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        status = None
    for detail in status.details if status else ():
        retry = error_details_pb2.RetryInfo()
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            line += f" (try again in {retry.retry_delay.seconds} s)"
    return line


def _unreachable(error: Any) -> bool:
    """Whether nobody answered: a server of ours would have sent details along."""
    import grpc

    if not hasattr(error, "trailing_metadata") or error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    return all(key != "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


@contextlib.contextmanager
def connect(server: str) -> Iterator[grpc.Channel]:
    """A channel to `server`. What fails inside ends the command with one line and its exit code."""
    import grpc

    options = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
    try:
        with grpc.insecure_channel(server, options=options) as channel:
            yield channel
    except grpc.RpcError as error:
        gone = f"no answer from a server at {server}: " if _unreachable(error) else ""
        raise fail(gone + describe(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
