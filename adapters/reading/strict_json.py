"""JSON from strangers: bounded in size, depth and number of values, no doubled keys, no NaN or Infinity.

All bounds are proved on the bytes, in time linear in their number, before anything is built from them.
"""

from __future__ import annotations

import json
import re

from lorry.adapters.errors import MalformedAdapter

MAX_DEPTH = 32
MAX_VALUES = 1 << 18

# Strings, also one without an end, and what is outside of them. Possessive: each byte is looked at once.
_NOT_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?"?|[^][{}"]++', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, what: str, max_bytes: int) -> dict[str, object]:
    """The JSON object that is the whole of `data`; `what` names it in the MalformedAdapter that is raised."""
    if len(data) > max_bytes:
        raise MalformedAdapter(f"{what} has {len(data)} bytes, at most {max_bytes} are read", what)
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise MalformedAdapter(f"{what} has more than {MAX_VALUES} values", what)
    if _depth(data) > MAX_DEPTH:
        raise MalformedAdapter(f"{what} is nested deeper than {MAX_DEPTH} levels", what)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair is no text: no message could carry it
    except (UnicodeError, ValueError) as error:
        raise MalformedAdapter(f"{what} is not valid JSON: {error}", what) from None
    if not isinstance(value, dict):
        raise MalformedAdapter(f"{what} holds a JSON {type(value).__name__}, an object is expected", what)
    return value


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for bracket in _NOT_BRACKETS.sub(b"", data):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
        if not 0 <= depth <= MAX_DEPTH:
            break  # the rest would change nothing
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
