"""A client's structured output as a grammar in llguidance's own words.

json_schema   itself; each character of a string has one spelling, or keys could differ in spelling only
json_object   {"type": "object"}
regex         itself, matched whole
choice        a regular expression, (?:a|b|…)
grammar       itself, without what would bring back the options that are refused elsewhere
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from lorry.server.errors import InvalidField
from lorry.server.grammars import schema as schemas
from lorry.server.params import StructuredOutput

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_OPTIONS: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": False,
    "json_allowed_escapes": 'nrbtf\\"',
    "whitespace_pattern": r"[ \n\r\t]{1,40}",  # models are known to write nothing but white space where they may
}
SHOWN = 400  # characters of llguidance's messages

_SECTION = re.compile(r"^\s*(%(?!regex|ignore)\w+)|(%(?:json|lark))\b", re.MULTILINE)
_ATTRIBUTE = re.compile(r"\[[^\]\n]*\b(temperature|capture|stop_capture)\b[^\]\n]*\]\s*:")


def definition(wanted: StructuredOutput) -> str:
    """What llguidance compiles; raises InvalidField naming the field and what it holds that is not served."""
    try:
        match wanted.kind:
            case "json_schema":
                return _json(wanted.text)
            case "json_object":
                return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_OPTIONS)
            case "regex":
                return LLMatcher.grammar_from_regex(wanted.text)
            case "choice":
                return LLMatcher.grammar_from_regex("|".join(map(_literal, json.loads(wanted.text))))
            case "grammar":
                return _lark(wanted.text)
    except ValueError as error:
        raise refused(wanted, str(error)) from error


def refused(wanted: StructuredOutput, reason: str) -> InvalidField:
    """The error that says why a grammar is not served."""
    reason = " ".join(reason.replace("<non-verbose/>", "").split())
    if len(reason) > SHOWN:
        reason = reason[:SHOWN] + "…"
    return InvalidField(f"{field(wanted)} is refused: {reason}", field=field(wanted))


def field(wanted: StructuredOutput) -> str:
    """The path that the contract gives it."""
    return f"structured_output.{wanted.kind}"


def _json(text: str) -> str:
    schema = schemas.parse(text)
    schemas.check(schema)
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def _lark(text: str) -> str:
    if found := _SECTION.search(text):
        raise ValueError(f"{found[1] or found[2]} is not served")
    if found := _ATTRIBUTE.search(text):
        raise ValueError(f"the attribute {found[1]} is not served")
    return LLMatcher.grammar_from_lark(text)


def _literal(text: str) -> str:
    """A regular expression that matches `text` alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
