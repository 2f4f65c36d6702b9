"""Checks of single fields: each returns the value or raises InvalidField with path, value and what it may be."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from lorry.server.errors import InvalidField

ADAPTER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
REQUEST_ID = re.compile(r"[!-~]{1,128}")
REVISION = re.compile(r"[0-9a-f]{64}")

_SHOWN = 64
"""Characters of a refused value that its error shows: statuses travel in headers, which are small."""


def refuse(path: str, value: object, accepted: str) -> InvalidField:
    """The error that refuses `value`; numbers are shown with the seven digits that a float32 has."""
    shown = f"{value:.7g}" if isinstance(value, float) else repr(value)
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "…"
    message = f"{path} is {shown}; accepted: {accepted}"
    return InvalidField(message, field=path, value=shown, accepted=accepted)


def number(path: str, value: float, low: float, high: float, accepted: str | None = None) -> float:
    """A finite number in [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        raise refuse(path, value, accepted or f"{low:g} to {high:g}")
    return value


def integer(path: str, value: int, low: int, high: int, accepted: str | None = None) -> int:
    """An integer in [low, high]."""
    if not low <= value <= high:
        raise refuse(path, value, accepted or f"{low} to {high}")
    return value


def text(path: str, value: str, pattern: re.Pattern[str], accepted: str) -> str:
    """A string that `pattern` matches whole."""
    if not pattern.fullmatch(value):
        raise refuse(path, value, accepted)
    return value


def adapter_id(path: str, value: str) -> str:
    return text(path, value, ADAPTER_ID, "1 to 64 of A-Z a-z 0-9 . _ -")


def request_id(path: str, value: str) -> str:
    return text(path, value, REQUEST_ID, "1 to 128 visible ASCII characters")


def revision(path: str, value: str) -> str:
    return text(path, value, REVISION, "64 lower-case hexadecimal digits")


def tokens(path: str, values: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Token ids in [0, vocab_size)."""
    ids = tuple(values)
    if ids and max(ids) >= vocab_size:
        index = next(index for index, token in enumerate(ids) if token >= vocab_size)
        raise refuse(f"{path}[{index}]", ids[index], f"token ids 0 to {vocab_size - 1}")
    return ids


def unique(path: str, values: Iterable[str | int]) -> None:
    """No value twice."""
    seen: set[str | int] = set()
    for index, value in enumerate(values):
        if value in seen:
            raise refuse(f"{path}[{index}]", value, "no value twice")
        seen.add(value)


def seconds(path: str, value: Duration, *, zero: bool = False, high: float = 86400.0) -> float:
    """A well-formed duration in seconds: above 0, or from 0 on with `zero`, to `high`."""
    if not -999_999_999 <= value.nanos <= 999_999_999 or value.seconds * value.nanos < 0:
        shown = f"{value.seconds} s {value.nanos} ns"
        raise refuse(path, shown, "nanos below 1e9 and of the sign of seconds")
    total = value.seconds + value.nanos / 1e9
    if not 0 <= total <= high or (total == 0 and not zero):
        raise refuse(path, total, f"{'0' if zero else 'above 0'} to {high:g} seconds")
    return total


def refuse_unknown(message: Message, path: str = "") -> None:
    """Refuse fields that this server's contract does not have, in `message` and all messages in it.

    A client of a later contract would otherwise believe that they were honoured.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        where = path or "the request"
        raise InvalidField(
            f"{where} has a field of number {number}, which this server does not know",
            field=path,
            number=number,
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        below = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Message):
            refuse_unknown(value, below)
        else:
            for index, item in enumerate(value):
                refuse_unknown(item, f"{below}[{index}]")
