"""Records as lines and as JSON, with the request that they are about."""

from __future__ import annotations

import io
import json
import logging

import pytest

from lorry.server.observability import logs


@pytest.fixture(autouse=True)
def _root_logger_is_put_back():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def emit(format, level="info"):
    stream = io.StringIO()
    logs.set_up(format, level, stream)
    log = logging.getLogger("lorry.server.somewhere")
    log.debug("not shown")
    log.info("before %d", 3)
    token = logs.request_id_in_logs.set("req-7")
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        log.exception("bad ü")
    finally:
        logs.request_id_in_logs.reset(token)
    return stream.getvalue()


def test_lines():
    first, second, *rest = emit("lines").splitlines()
    assert first.endswith("INFO    somewhere: before 3")
    assert second.endswith("ERROR   somewhere: bad ü [req-7]")
    assert rest[0].startswith("Traceback") and rest[-1] == "ZeroDivisionError: division by zero"


def test_json():
    first, second = map(json.loads, emit("json").splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("info", "lorry.server.somewhere", "before 3")
    assert "request_id" not in first and "exception" not in first
    assert second["request_id"] == "req-7" and "ZeroDivisionError" in second["exception"]
    assert first["time"].endswith("Z") and len(first["time"]) == len("2024-01-01T00:00:00.000Z")


def test_the_level_is_kept():
    assert emit("lines", "error").count("somewhere: ") == 1
