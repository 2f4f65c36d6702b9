"""What becomes of each kind of structured output, and what is refused by name."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorry.server.errors import InvalidField
from lorry.server.grammars.compiling import compiled
from lorry.server.params import GrammarKind, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "height": {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2.5},
        "role": {"enum": ["admin", "user", 7, None, {"x": [1]}]},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "minItems": 1, "maxItems": 3},
        "boss": {"$ref": "#/$defs/boss"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"boss": {"anyOf": [{"type": "null"}, {"type": "object", "maxProperties": 1}]}},
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("schema", [PERSON, TREE, {"additionalProperties": {"type": "integer"}, "type": "object"}, {}])
def test_random_answers_are_valid(schema: Any, vocabulary: Any, walker: Any) -> None:
    grammar = compiled(StructuredOutput("json_schema", json.dumps(schema)), vocabulary)
    answers = [walker.answer(grammar, seed) for seed in range(25)]
    ended = [answer for answer in answers if answer is not None]
    assert len(ended) >= 20
    assert len(set(ended)) > 10
    for answer in ended:
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


def test_any_json_object(vocabulary: Any, walker: Any) -> None:
    grammar = compiled(StructuredOutput("json_object"), vocabulary)
    for seed in range(10):
        answer = walker.answer(grammar, seed)
        assert answer is None or isinstance(json.loads(answer), dict)
    for text in ("{}", '{"a":[1,{"b":null}],"ä":"\\n"}'):
        assert walker.accepts(grammar, text)
    for text in ("[]", "1", "{", '{"a":}', "{'a':1}", ""):
        assert not walker.accepts(grammar, text)


def test_white_space_ends(vocabulary: Any, walker: Any) -> None:
    grammar = compiled(StructuredOutput("json_object"), vocabulary)
    assert walker.accepts(grammar, "{\n" + " " * 39 + '"a": 1}')
    assert not walker.accepts(grammar, "{\n" + " " * 50 + '"a": 1}')


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{4}-\d{2}-\d{2}",
        r"(?:red|green|blue)(?:, (?:red|green|blue)){0,3}",
        r"[A-Z][a-z]+ [A-Z]\.",
        r"(?i:yes|no)[!?]*",
        r"[^\W\d_]{1,9}",
        r"(a|b)*abb",
        r"\{\"x\": -?(0|[1-9]\d*)\}",
        r".{3,8}",
        r"(?:[äöü]{2}|[一-龥]{1,3}|\U0001F600)x",
        r"",
    ],
)
def test_random_answers_match_the_expression(pattern: str, vocabulary: Any, walker: Any) -> None:
    grammar = compiled(StructuredOutput("regex", pattern), vocabulary)
    for seed in range(6):
        answer = walker.answer(grammar, seed, most=60)
        assert answer is not None or pattern.endswith(("abb", "+ [A-Z]\\."))
        assert answer is None or re.fullmatch(pattern, answer), answer


# the vocabulary has no token for some bytes of what is left out
TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Co", "Cn"], max_codepoint=0x1FFFF), min_size=1, max_size=8
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.lists(TEXTS, min_size=1, max_size=5))
def test_a_choice_is_one_of_them(choices: list[str], vocabulary: Any, walker: Any) -> None:
    grammar = compiled(StructuredOutput("choice", json.dumps(choices)), vocabulary)
    answer = walker.answer(grammar, len(choices))
    assert answer in choices
    assert all(walker.accepts(grammar, choice) for choice in choices)


def test_a_grammar_in_lark(vocabulary: Any, walker: Any) -> None:
    sums = 'start: term (("+" | "-") term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'
    grammar = compiled(StructuredOutput("grammar", sums), vocabulary)
    for text, good in {"1": True, "(1+23)-4": True, "((7))": True, "1+": False, "(1": False, "1234": False}.items():
        assert walker.accepts(grammar, text) is good
    ended = [answer for seed in range(20) if (answer := walker.answer(grammar, seed, most=60)) is not None]
    assert ended
    for answer in ended:
        assert re.fullmatch(r"[-+()0-9]+", answer) and answer.count("(") == answer.count(")")


REFUSED: list[tuple[GrammarKind, str, str]] = [
    ("json_schema", '{"not": {}}', "not"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"if": {}, "then": {}}', '"if", "then"'),
    ("json_schema", '{"properties": {"a": {"items": {"contains": {}}}}}', "contains"),
    ("json_schema", '{"oneOf": [{"minimum": 1}, {"maximum": 5}]}', "oneOf"),
    ("json_schema", '{"type": "string", "format": "nonsense"}', "nonsense"),
    ("json_schema", '{"type": "string", "pattern": "a(?=b)"}', "look-around"),
    ("json_schema", '{"$ref": "http://example.com/schema"}', "http://example.com/schema"),
    ("json_schema", '{"type": "object", "minProperties": 2}', "minProperties is 2 with 0 required"),
    ("json_schema", '{"allOf": [{"minProperties": 3, "required": ["a"]}]}', "minProperties is 3 with 1 required"),
    ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
    ("json_schema", '{"properties": {"a": {"x-guidance": {}}}}', "x-guidance"),
    (
        "json_schema",
        '{"$schema": "http://json-schema.org/draft-07/schema#", "items": {"$ref": "#", "maxProperties": 1}}',
        "maxProperties means nothing",
    ),
    ("json_schema", json.dumps({"const": "a\x01b"}), "control character"),
    ("json_schema", json.dumps({"properties": {"a\x7f": {}}}), "control character"),
    ("json_schema", json.dumps({"pattern": r"^a\x01b$"}), r"control character \x01"),
    ("json_schema", json.dumps({"items": {"patternProperties": {r"\u{7f}": {}}}}), r"control character \u{7f}"),
    ("json_schema", '{"type": "string", "type": "integer"}', "'type' stands twice"),
    ("json_schema", '{"minimum": NaN}', "NaN"),
    ("json_schema", "[]", "JSON object"),
    ("json_schema", "true", "JSON object"),
    ("json_schema", "{", "no JSON"),
    ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "deep"),
    ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
    ("json_schema", '{"allOf": [{"type": "integer"}, {"type": "string"}]}', "Unsatisfiable"),
    ("regex", "a(?=b)", "look-around"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", "[", "unclosed character class"),
    ("regex", r"\bx\b", "lookaround"),
    ("regex", r"[^\s\S]", "no text"),
    ("regex", "(" * 5000 + "a" + ")" * 5000, "invalid regex"),
    ("grammar", 'root ::= "a"', "Expected token"),
    ("grammar", "start: other", "other"),
    ("grammar", 'start: %json {"uniqueItems": true}', "%json"),
    ("grammar", '%llguidance {"allow_invalid_utf8": true}\nstart: "a"', "%llguidance"),
    ("grammar", 'start: a\na[temperature=0.5]: "x"', "temperature"),
    ("grammar", "start: <|nonsense|>", "special token"),
    ("grammar", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000, "nested"),
]


@pytest.mark.parametrize(("kind", "text", "words"), REFUSED, ids=[f"{kind} {text[:40]}" for kind, text, _ in REFUSED])
def test_refused(kind: GrammarKind, text: str, words: str, vocabulary: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        compiled(StructuredOutput(kind, text), vocabulary)
    assert caught.value.fields["field"] == f"structured_output.{kind}"
    assert words in caught.value.message
    assert len(caught.value.message) < 500


def test_a_key_has_one_spelling(vocabulary: Any, walker: Any) -> None:
    """Or a free key, spelled otherwise, could take the place of a declared one."""
    schema = {"properties": {"a\nb": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    grammar = compiled(StructuredOutput("json_schema", json.dumps(schema)), vocabulary)
    assert walker.accepts(grammar, '{"a\\nb":1}')
    assert not walker.accepts(grammar, '{"a\\nb":"x"}')
    assert not walker.accepts(grammar, '{"a\\u000ab":"x"}')


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a|b)*a(a|b){200}"),
        ("regex", "(.*a){50}"),
        ("regex", "((a{1,1000}){1,1000}){1,1000}"),
        ("regex", ".{1,1000000}"),
        ("regex", "|".join(f"w{i}[a-z]{{1,{i % 300 + 1}}}" for i in range(2000))[:16384].rsplit("|", 1)[0]),
        ("json_schema", '{"type": "string", "maxLength": 1000000000}'),
        ("json_schema", '{"type": "array", "minItems": 1000000, "maxItems": 10000000}'),
        ("json_schema", '{"type": "string", "pattern": "(a?){500}a{500}"}'),
        ("json_schema", json.dumps({"enum": [f"x{i}" * 5 for i in range(20_000)]})),
        ("json_schema", json.dumps({"allOf": [{"anyOf": [{"const": j} for j in range(i, 9)]} for i in range(9)]})),
        ("grammar", "start: x\nx: x x x | x x | /a+/ | "),
        ("grammar", "start: A\nA: /(.*a.{300})/ & /(.*b.{301})/"),
    ],
)
def test_a_hostile_grammar_ends_soon(kind: GrammarKind, text: str, vocabulary: Any, walker: Any) -> None:
    """Compiled, refused, or cut off while the answer grows: each within the library's own limits."""
    start = time.process_time()
    try:
        matcher = compiled(StructuredOutput(kind, text), vocabulary).matcher()
    except InvalidField:
        matcher = None
    assert time.process_time() - start < 5
    slowest = 0.0
    for step in range(40 if matcher is not None else 0):
        assert matcher is not None
        before = time.thread_time()
        mask = matcher.compute_bitmask()
        slowest = max(slowest, time.thread_time() - before)
        allowed = [8 * place + bit for place, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
        going_on = [token for token in allowed if token != 2]
        if matcher.is_error() or not going_on or not matcher.consume_token(going_on[step * 7919 % len(going_on)]):
            break
    assert slowest < 0.5
