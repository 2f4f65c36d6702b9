"""JSON schemas that llguidance would take in another sense than JSON Schema's are refused here.

It refuses by itself every keyword that it does not know how to honour. What is left:

    x-guidance       its own options, some of which loosen the schema
    minProperties    it counts keys, but does not keep a free one from coming twice, which in JSON is one property
    $ref             before draft 2019-09 what stands beside it is ignored; llguidance honours both

and control characters that JSON can only write as \\uXXXX. Our grammars have no such escapes, so that each text has one
spelling and no key comes twice in two of them; llguidance then leaves such a character out, instead of refusing it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")
ANNOTATIONS = {
    "$ref",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "definitions",
    "readOnly",
    "writeOnly",
}
SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
VALUES = {"const", "enum", "default", "examples", "example"}

_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_ESCAPES = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|[xuU]\{([0-9A-Fa-f]+)\}|[acv0])")


def parse(text: str) -> dict[str, Any]:
    """The schema of a JSON text; raises ValueError saying what is wrong with it."""
    try:
        schema = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    return schema


def check(schema: dict[str, Any]) -> None:
    """Raises ValueError naming the keyword that could not be honoured exactly."""
    draft = schema.get("$schema")
    old = isinstance(draft, str) and any(name in draft for name in OLD_DRAFTS)
    _check_characters(schema)
    for part in _schemas(schema):
        patterns = part.get("patternProperties")
        for pattern in [part.get("pattern"), *(patterns if isinstance(patterns, dict) else ())]:
            if isinstance(pattern, str) and (found := _escaped_control(pattern)):
                raise ValueError(f"the pattern {pattern!r} names the control character {found}")
        if "x-guidance" in part:
            raise ValueError("the keyword x-guidance is not served")
        least, required = part.get("minProperties"), part.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least - named > 1:
            raise ValueError(
                f"the keyword minProperties is {least} with {named} required properties; at most one more is served, "
                "because free keys may repeat"
            )
        if old and "$ref" in part and (beside := part.keys() - ANNOTATIONS):
            raise ValueError(f"beside the keyword $ref {', '.join(sorted(beside))} means nothing in {draft}")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All subschemas, the schema first; what is not in the place of a schema may come too."""
    todo = [schema]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            yield part
            for keyword, value in part.items():
                if keyword in SCHEMAS_BY_NAME and isinstance(value, dict):
                    todo += value.values()
                elif keyword not in VALUES:
                    todo.append(value)


def _check_characters(schema: dict[str, Any]) -> None:
    todo: list[Any] = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, str) and _CONTROL.search(value):
            raise ValueError(f"the text {value!r} has a control character that only \\uXXXX can write")
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value


def _escaped_control(pattern: str) -> str | None:
    for found in _ESCAPES.finditer(pattern):
        digits = next((group for group in found.groups() if group), None)
        if digits is None or (int(digits, 16) < 0x80 and _CONTROL.match(chr(int(digits, 16)))):
            return found[0]
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
