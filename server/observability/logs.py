"""Logs on stderr, as lines for people or as one JSON object a line, each with the request that it is about."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import TextIO

from lorry.server.config import LogFormat, LogLevel

request_id_in_logs: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Set once a task works for a request; every record of that task bears it."""


class _Context(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id_in_logs.get()
        return True


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is when it writes, so that a progress bar may redirect it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class LineFormatter(logging.Formatter):
    """`12:00:00.123 WARNING frontend.engine_process: text [request]`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("lorry.").removeprefix("server.")
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {name}: {record.getMessage()}"
        if request_id := getattr(record, "request_id", ""):
            line += f" [{request_id}]"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """Keys: time (ISO 8601, UTC), level, logger, message; request_id and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up(format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send every record of `level` and above to `stream` (stderr); replaces what was set up before."""
    handler: logging.Handler = logging.StreamHandler(stream) if stream else _Stderr()
    handler.setFormatter(JsonFormatter() if format == "json" else LineFormatter())
    handler.addFilter(_Context())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
