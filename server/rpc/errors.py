"""Domain error → gRPC status with `google.rpc` details: one table.

Every status bears an ErrorInfo whose `reason` is the error's class in capitals and whose `metadata` holds
the numbers and names that the message speaks of, beside the detail that the table names. What is no domain
error is a bug: the client gets INTERNAL and an opaque id, the log bears the same id with the traceback.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from lorry.server import errors

DOMAIN = "lorry"
MESSAGE_BYTES = 512
FIELD_BYTES = 256

_log = logging.getLogger(__name__)


def _bad_request(error: errors.LorryError) -> Any:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.fields.get("field", ""), description=error.message
    )
    return error_details_pb2.BadRequest(field_violations=[violation])


def _resource(error: errors.LorryError) -> Any:
    return error_details_pb2.ResourceInfo(
        resource_type=error.fields.get("resource_type", ""),
        resource_name=error.fields.get("resource_name", ""),
        description=error.message,
    )


def _precondition(error: errors.LorryError) -> Any:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type=_reason(error), subject=error.fields.get("resource_name", ""), description=error.message
    )
    return error_details_pb2.PreconditionFailure(violations=[violation])


def _quota(error: errors.LorryError) -> Any:
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=error.fields.get("resource_name", ""), description=error.message
    )
    return error_details_pb2.QuotaFailure(violations=[violation])


def _retry(seconds: int) -> Callable[[errors.LorryError], Any]:
    def detail(error: errors.LorryError) -> Any:
        return error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds))

    return detail


@dataclass(frozen=True)
class Row:
    """A line of the table: the code, and the details that follow the ErrorInfo."""

    code: grpc.StatusCode
    details: tuple[Callable[[errors.LorryError], Any], ...] = ()


_Code = grpc.StatusCode
TABLE: dict[type[errors.LorryError], Row] = {
    errors.InvalidField: Row(_Code.INVALID_ARGUMENT, (_bad_request,)),
    errors.PromptTooLong: Row(_Code.INVALID_ARGUMENT),
    errors.MalformedAdapter: Row(_Code.INVALID_ARGUMENT, (_bad_request,)),
    errors.PathRefused: Row(_Code.INVALID_ARGUMENT, (_bad_request,)),
    errors.NotFound: Row(_Code.NOT_FOUND, (_resource,)),
    errors.WrongBase: Row(_Code.FAILED_PRECONDITION, (_precondition,)),
    errors.RevisionMismatch: Row(_Code.FAILED_PRECONDITION, (_precondition,)),
    errors.AlreadyExists: Row(_Code.ALREADY_EXISTS, (_resource,)),
    errors.OutOfMemory: Row(_Code.RESOURCE_EXHAUSTED, (_quota, _retry(10))),
    errors.SourceUnavailable: Row(_Code.UNAVAILABLE, (_retry(10),)),
    errors.QueueFull: Row(_Code.UNAVAILABLE, (_retry(1),)),
    errors.Draining: Row(_Code.UNAVAILABLE, (_retry(5),)),
    errors.EngineUnavailable: Row(_Code.UNAVAILABLE, (_retry(2),)),
    errors.DeadlineExceeded: Row(_Code.DEADLINE_EXCEEDED),
}


def _reason(error: errors.LorryError) -> str:
    """`PromptTooLong` → `PROMPT_TOO_LONG`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).upper()


def _clip(text: str, most: int) -> str:
    """At most `most` bytes of UTF-8: a status travels in trailers, of which a client takes 8 KiB."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


def status_of(error: errors.LorryError) -> status_pb2.Status:
    """The status of a domain error; raises KeyError for a class that the table lacks."""
    row = TABLE[type(error)]
    fields: dict[str, object] = {key: _clip(value, FIELD_BYTES) for key, value in error.fields.items()}
    error = type(error)(_clip(error.message, MESSAGE_BYTES), **fields)
    info = error_details_pb2.ErrorInfo(reason=_reason(error), domain=DOMAIN, metadata=error.fields)
    status = status_pb2.Status(code=row.code.value[0], message=error.message)
    for message in (info, *(detail(error) for detail in row.details)):
        packed = any_pb2.Any()
        packed.Pack(message)
        status.details.append(packed)
    return status


def status_of_bug(method: str, error: BaseException) -> status_pb2.Status:
    """INTERNAL with an opaque id; the log gets the id and the traceback, the client no word of it."""
    bug_id = secrets.token_hex(8)
    _log.error("internal error %s in %s", bug_id, method, exc_info=error)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": bug_id})
    packed = any_pb2.Any()
    packed.Pack(info)
    message = f"internal error {bug_id}; the server's log has it under this id"
    return status_pb2.Status(code=code_pb2.INTERNAL, message=message, details=[packed])


def status_for(method: str, error: BaseException) -> status_pb2.Status:
    """The status that answers `error`, whatever it is."""
    if isinstance(error, errors.LorryError) and type(error) in TABLE:
        return status_of(error)
    return status_of_bug(method, error)
