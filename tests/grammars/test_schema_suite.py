"""Schemas that nobody here wrote: each is refused in its keyword's name, or admits valid instances only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lorry.server.errors import InvalidField
from lorry.server.grammars.compiling import compiled
from lorry.server.params import StructuredOutput

SUITE = Path(__file__).parent / "json_schema_test_suite"
VALIDATORS = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft7": jsonschema.Draft7Validator,
}
URIS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}
SERVED = {"draft2020-12": 130, "draft7": 130}  # schemas at least, so that refusing all does not pass


def cases(draft: str) -> list[tuple[str, Any, list[Any]]]:
    """What it is about, the schema, its instances; a schema that does not say its draft is told it."""
    found = []
    for file in sorted((SUITE / draft).glob("*.json")):
        for case in json.loads(file.read_text()):
            schema = case["schema"]
            if isinstance(schema, dict):
                schema = {"$schema": URIS[draft]} | schema
            found.append((f"{file.stem}: {case['description']}", schema, case["tests"]))
    return found


@pytest.mark.parametrize("draft", list(VALIDATORS))
def test_what_is_served_admits_valid_instances_only(draft: str, vocabulary: Any, walker: Any, compact: Any) -> None:
    served = ended = accepted = valid = 0
    refusals: list[tuple[str, str]] = []
    for seed, (name, schema, instances) in enumerate(cases(draft)):
        try:
            grammar = compiled(StructuredOutput("json_schema", json.dumps(schema)), vocabulary)
        except InvalidField as error:
            refusals.append((error.fields["field"], error.message))
            continue
        served += 1
        for instance in instances:
            taken = walker.accepts(grammar, compact(instance["data"]))
            assert instance["valid"] or not taken, (name, instance["description"])
            accepted += taken
            valid += instance["valid"]
        text = walker.answer(grammar, seed, most=80)
        if text is not None:
            ended += 1
            VALIDATORS[draft](schema).validate(json.loads(text))
    path = "structured_output.json_schema"
    assert all(field == path and message.startswith(f"{path} is refused: ") for field, message in refusals)
    assert served >= SERVED[draft]
    assert ended >= 0.9 * served
    assert accepted >= 0.9 * valid  # the others differ in the order of their keys or in how a number is written
