"""The error table: every domain error has a row, and every row its details."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from lorry.server import errors
from lorry.server.rpc.errors import TABLE, status_for, status_of

_Code = grpc.StatusCode


def details_of(status: Any) -> dict[str, Any]:
    found = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


ROWS: list[tuple[errors.LorryError, grpc.StatusCode, set[str], str]] = [
    (errors.InvalidField("m", field="spec.text"), _Code.INVALID_ARGUMENT, {"BadRequest"}, "INVALID_FIELD"),
    (
        errors.PromptTooLong("m", prompt_tokens=9, context_length=8),
        _Code.INVALID_ARGUMENT,
        set(),
        "PROMPT_TOO_LONG",
    ),
    (errors.MalformedAdapter("m", field="r"), _Code.INVALID_ARGUMENT, {"BadRequest"}, "MALFORMED_ADAPTER"),
    (errors.PathRefused("m", field="path"), _Code.INVALID_ARGUMENT, {"BadRequest"}, "PATH_REFUSED"),
    (errors.NotFound("m", resource_type="adapter"), _Code.NOT_FOUND, {"ResourceInfo"}, "NOT_FOUND"),
    (errors.WrongBase("m"), _Code.FAILED_PRECONDITION, {"PreconditionFailure"}, "WRONG_BASE"),
    (
        errors.RevisionMismatch("m", expected="a", actual="b"),
        _Code.FAILED_PRECONDITION,
        {"PreconditionFailure"},
        "REVISION_MISMATCH",
    ),
    (errors.AlreadyExists("m"), _Code.ALREADY_EXISTS, {"ResourceInfo"}, "ALREADY_EXISTS"),
    (errors.OutOfMemory("m"), _Code.RESOURCE_EXHAUSTED, {"QuotaFailure", "RetryInfo"}, "OUT_OF_MEMORY"),
    (errors.SourceUnavailable("m"), _Code.UNAVAILABLE, {"RetryInfo"}, "SOURCE_UNAVAILABLE"),
    (errors.QueueFull("m"), _Code.UNAVAILABLE, {"RetryInfo"}, "QUEUE_FULL"),
    (errors.Draining("m"), _Code.UNAVAILABLE, {"RetryInfo"}, "DRAINING"),
    (errors.EngineUnavailable("m"), _Code.UNAVAILABLE, {"RetryInfo"}, "ENGINE_UNAVAILABLE"),
    (errors.DeadlineExceeded("m"), _Code.DEADLINE_EXCEEDED, set(), "DEADLINE_EXCEEDED"),
]


@pytest.mark.parametrize(("error", "code", "details", "reason"), ROWS)
def test_rows(error: errors.LorryError, code: grpc.StatusCode, details: set[str], reason: str) -> None:
    status = status_of(error)
    found = details_of(status)
    assert status.code == code.value[0]
    assert status.message == "m"
    assert set(found) == details | {"ErrorInfo"}
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == (reason, "lorry")
    assert dict(found["ErrorInfo"].metadata) == error.fields


def test_every_domain_error_has_a_row() -> None:
    known = {cls for cls in errors.LorryError.__subclasses__() if cls.__module__ == errors.__name__}
    assert set(TABLE) == known
    assert {type(row[0]) for row in ROWS} == set(TABLE)


def test_details_name_the_thing() -> None:
    error = errors.NotFound("no adapter 'x'", resource_type="adapter", resource_name="x")
    resource = details_of(status_of(error))["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name, resource.description) == (
        "adapter",
        "x",
        "no adapter 'x'",
    )
    violation = details_of(status_of(errors.InvalidField("bad", field="spec.text")))["BadRequest"]
    assert violation.field_violations[0].field == "spec.text"
    assert violation.field_violations[0].description == "bad"
    assert details_of(status_of(errors.QueueFull("m")))["RetryInfo"].retry_delay.seconds > 0


def test_status_fits_into_headers() -> None:
    """A status travels in the trailers, of which a client takes 8 KiB; long words of others are cut."""
    status = status_of(errors.MalformedAdapter("x" * 100_000, field="f" * 100_000, more="m" * 100_000))
    assert status.ByteSize() < 4096


@pytest.mark.parametrize("bug", [ValueError("secret"), errors.LorryError("secret"), KeyError("secret")])
def test_a_bug_tells_nothing(bug: Exception, caplog: pytest.LogCaptureFixture) -> None:
    status = status_for("/some/Method", bug)
    assert status.code == _Code.INTERNAL.value[0]
    assert b"secret" not in status.SerializeToString()
    bug_id = details_of(status)["ErrorInfo"].metadata["error_id"]
    assert len(bug_id) == 16
    assert bug_id in caplog.text
    assert "secret" in caplog.text
