"""Structured output on the wire: which constraint, and what goes with it; what a grammar says is checked elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lorry.server.errors import InvalidField
from lorry.server.params import GrammarKind, StructuredOutput
from lorry.server.rpc import fields
from lorry.server.rpc.fields import refuse
from lorry.v1 import generation_pb2

MAX_GRAMMAR_LENGTH = 262_144
MAX_REGEX_LENGTH = 16_384
MAX_CHOICES = 1024
MAX_CHOICE_LENGTH = 4096

_NOT_SKIPPED = ("bad_words", "allowed_token_ids", "no_repeat_ngram_size")  # of spec.sampling: forced text ignores them


def output(spec: generation_pb2.GenerationSpec) -> StructuredOutput | None:
    """Lengths and combinations; whether the grammar itself is served says who compiles it."""
    if not spec.HasField("structured_output"):
        return None
    path, wanted = "spec.structured_output", spec.structured_output
    kind: GrammarKind
    match wanted.WhichOneof("constraint"):
        case "json_schema":
            kind, text = "json_schema", _grammar(f"{path}.json_schema", wanted.json_schema, MAX_GRAMMAR_LENGTH)
        case "json_object":
            if not wanted.json_object:
                raise refuse(f"{path}.json_object", wanted.json_object, "true")
            kind, text = "json_object", ""
        case "regex":
            kind, text = "regex", _grammar(f"{path}.regex", wanted.regex, MAX_REGEX_LENGTH)
        case "choice":
            kind, text = "choice", _choices(f"{path}.choice.values", wanted.choice.values)
        case "grammar":
            kind, text = "grammar", _grammar(f"{path}.grammar", wanted.grammar, MAX_GRAMMAR_LENGTH)
        case _:
            raise InvalidField(
                f"{path} is empty; accepted: one of json_schema, json_object, regex, choice, grammar", field=path
            )
    if spec.stopping.ignore_eos:
        raise refuse("spec.stopping.ignore_eos", True, f"false with {path}, which says where the answer ends")
    if wanted.skip_forced:
        _check_skip(spec, f"{path}.skip_forced")
    return StructuredOutput(kind, text, wanted.skip_forced)


def _grammar(path: str, text: str, most: int) -> str:
    if not 1 <= len(text) <= most:
        raise InvalidField(f"{path} has {len(text)} characters; accepted: 1 to {most}", field=path, value=len(text))
    return text


def _choices(path: str, choices: Sequence[str]) -> str:
    """The choices as a JSON list."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidField(f"{path} has {len(choices)} texts; accepted: 1 to {MAX_CHOICES}", field=path)
    for index, choice in enumerate(choices):
        _grammar(f"{path}[{index}]", choice, MAX_CHOICE_LENGTH)
    fields.unique(path, choices)
    return json.dumps(list(choices))


def _check_skip(spec: generation_pb2.GenerationSpec, path: str) -> None:
    """Raises InvalidField for what forced tokens, which nobody chooses, would pass by."""
    if spec.response.HasField("logprobs"):
        raise refuse(path, True, "false with response.logprobs: what is skipped has none")
    if (strategy := spec.WhichOneof("strategy")) in ("beam", "contrastive", "guidance"):
        raise refuse(path, True, f"false with {strategy}, which decides each token")
    for name in _NOT_SKIPPED:
        if getattr(spec.sampling, name):
            raise refuse(path, True, f"false with sampling.{name}: forced tokens pass it by")
