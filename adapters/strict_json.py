"""JSON from strangers: bounded in size and depth, no doubled keys, no NaN or Infinity."""

from __future__ import annotations

import json
import re

from lorry.adapters.errors import MalformedAdapter

MAX_DEPTH = 32

_NOT_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[^][{}"]++|"', re.DOTALL)  # strings, and what is outside of them


def parse_object(data: bytes, what: str, max_bytes: int) -> dict[str, object]:
    """The JSON object that is the whole of `data`; `what` names it in the MalformedAdapter that is raised."""
    if len(data) > max_bytes:
        raise MalformedAdapter(f"{what} has {len(data)} bytes, at most {max_bytes} are read", what)
    try:
        text = data.decode("utf-8")
        if _depth(text) > MAX_DEPTH:
            raise MalformedAdapter(f"{what} is nested deeper than {MAX_DEPTH} levels", what)
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError) as error:
        raise MalformedAdapter(f"{what} is not valid JSON: {error}", what) from None
    if not isinstance(value, dict):
        raise MalformedAdapter(f"{what} holds a JSON {type(value).__name__}, an object is expected", what)
    return value


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for bracket in _NOT_BRACKETS.sub("", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double[:80]!r} appears twice")
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number")
