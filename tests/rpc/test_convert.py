"""Every field of the contract: what it becomes, and what is refused in its name."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor

from lorry.server.engine.messages import AdapterRef, Dry, Mirostat
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import (
    BestOf,
    ChatMessage,
    ChatPrompt,
    Ranking,
    SpeculationWish,
    TextPrompt,
    TokenPrompt,
)
from lorry.server.params import BeamSearch, ContrastiveSearch, DoLa, EarlyStopping, Guidance, StructuredOutput
from lorry.server.rpc import convert
from lorry.v1 import adapter_pb2 as ad
from lorry.v1 import control_pb2 as ct
from lorry.v1 import generation_pb2 as gn

VOCAB = 211
REVISION = "0123456789abcdef" * 4


def spec(text: str) -> gn.GenerationSpec:
    """A spec in protobuf's text format; the prompt is there unless `text` brings one."""
    message = text_format.Parse(text, gn.GenerationSpec())
    if message.WhichOneof("prompt") is None:
        message.text = "hello"
    return message


def convert_spec(text: str, **changes: Any) -> Any:
    return convert.generation(spec(text), True, VOCAB, changes.get("deadline"))


# What the client wrote, the attribute path of the domain's request, what is there.
ACCEPTED: list[tuple[str, str, object]] = [
    ('request_id: "!~"', "request_id", "!~"),
    ('request_id: "' + "r" * 128 + '"', "request_id", "r" * 128),
    ('text: "x"', "prompt", TextPrompt("x")),
    ("token_ids { ids: [0, 210] }", "prompt", TokenPrompt((0, 210))),
    ('chat { messages { role: "user" } }', "prompt", ChatPrompt((ChatMessage("user", ""),), True)),
    (
        'chat { messages { role: "system" content: "s" } messages { role: "user" content: "u" } '
        "add_generation_prompt: false }",
        "prompt",
        ChatPrompt((ChatMessage("system", "s"), ChatMessage("user", "u")), False),
    ),
    (
        'chat { messages { role: "user" } add_generation_prompt: true }',
        "prompt",
        ChatPrompt((ChatMessage("user", ""),), True),
    ),
    ('guidance { scale: 0 text: "no" }', "negative", TextPrompt("no")),
    ('guidance { scale: 20 text: "no" }', "sampling.search", Guidance(20.0, ())),
    ("guidance { scale: 2 token_ids { ids: 3 } }", "negative", TokenPrompt((3,))),
    (
        'guidance { scale: 2 chat { messages { role: "user" content: "u" } add_generation_prompt: false } }',
        "negative",
        ChatPrompt((ChatMessage("user", "u"),), False),
    ),
    ('adapters { id: "a" } guidance { scale: 1.5 base: true }', "sampling.search", Guidance(1.5)),
    ("", "negative", None),
    ("", "sampling.dola", None),
    ("dola { bucket: LAYER_BUCKET_LOW }", "sampling.dola", DoLa(bucket="low")),
    ("dola { bucket: LAYER_BUCKET_HIGH } best_of { candidates: 2 }", "sampling.dola", DoLa(bucket="high")),
    ("dola { layers: [4, 0] }", "sampling.dola", DoLa((0, 4))),
    ("", "adapters", ()),
    ('adapters { id: "a" }', "adapters", (AdapterRef("a", 1.0, None),)),
    (
        f'adapters {{ id: "a.B_9-" weight: -1000 revision: "{REVISION}" }} adapters {{ id: "b" weight: 0 }}',
        "adapters",
        (AdapterRef("a.B_9-", -1000.0, REVISION), AdapterRef("b", 0.0, None)),
    ),
    ("sampling { }", "sampling.temperature", 1.0),
    ("sampling { temperature: 0 }", "sampling.temperature", 0.0),
    ("sampling { temperature: 100 }", "sampling.temperature", 100.0),
    ("sampling { top_p: 0.5 }", "sampling.top_p", 0.5),
    ("", "sampling.top_p", 1.0),
    ("sampling { top_k: 211 }", "sampling.top_k", 211),
    ("sampling { min_p: 1 }", "sampling.min_p", 1.0),
    ("sampling { typical_p: 0.25 }", "sampling.typical_p", 0.25),
    ("", "sampling.typical_p", 1.0),
    ("sampling { epsilon_cutoff: 0.125 }", "sampling.epsilon_cutoff", 0.125),
    ("sampling { eta_cutoff: 0.5 }", "sampling.eta_cutoff", 0.5),
    ("sampling { top_n_sigma: 100 }", "sampling.top_n_sigma", 100.0),
    ("sampling { mirostat { } top_p: 1 top_k: 0 }", "sampling.mirostat", Mirostat(5.0, 0.1)),
    ("sampling { mirostat { tau: 20 eta: 0.5 } }", "sampling.mirostat", Mirostat(20.0, 0.5)),
    ("", "sampling.mirostat", None),
    ("sampling { dry { } }", "sampling.dry", Dry(0.8, 1.75, 2, (), 0)),
    (
        "sampling { dry { multiplier: 100 base: 4 allowed_length: 50 range: 51 } }",
        "sampling.dry",
        Dry(100.0, 4.0, 50, (), 51),
    ),
    ('sampling { dry { sequence_breakers: ["a", "b"] } }', "texts.sequence_breakers", ("a", "b")),
    ("sampling { no_repeat_ngram_size: 1024 }", "sampling.no_repeat_ngram_size", 1024),
    (
        'sampling { bad_words { token_ids { ids: [0, 210] } } bad_words { text: "x" } }',
        "sampling.bad_words",
        ((0, 210),),
    ),
    (
        'sampling { bad_words { token_ids { ids: 1 } } bad_words { text: "x" } }',
        "texts.bad_words",
        (("x", "spec.sampling.bad_words[1].text"),),
    ),
    ("sampling { allowed_token_ids: [210, 0] }", "sampling.allowed_token_ids", (210, 0)),
    ("sampling { seed: 18446744073709551615 }", "sampling.seed", 2**64 - 1),
    ("sampling { seed: 0 }", "sampling.seed", 0),
    ("sampling { repetition_penalty: 0.25 }", "sampling.repetition_penalty", 0.25),
    ("", "sampling.repetition_penalty", 1.0),
    ("sampling { presence_penalty: -2 }", "sampling.presence_penalty", -2.0),
    ("sampling { frequency_penalty: 2 }", "sampling.frequency_penalty", 2.0),
    ("sampling { logit_bias { key: 210 value: -100 } }", "sampling.logit_bias", {210: -100.0}),
    ("sampling { n: 16 }", "sampling.n", 16),
    ("", "sampling.n", 1),
    ("", "sampling.search", None),
    ("beam { width: 2 }", "sampling.search", BeamSearch(2)),
    (
        "beam { width: 16 length_penalty: 0 early_stopping: EARLY_STOPPING_NEVER groups: 4 diversity_penalty: 0.5 }"
        " sampling { n: 16 repetition_penalty: 1.5 }",
        "sampling.search",
        BeamSearch(16, 0.0, EarlyStopping.NEVER, 4, 0.5),
    ),
    ("contrastive { top_k: 4 penalty_alpha: 0 }", "sampling.search", ContrastiveSearch(4, 0.0)),
    ("", "best_of", None),
    ("best_of { candidates: 5 } sampling { n: 5 }", "best_of", BestOf(5)),
    ("best_of { candidates: 2 ranking: BEST_OF_RANKING_SUM }", "best_of", BestOf(2, Ranking.SUM)),
    ("", "speculation", SpeculationWish(None, None, True)),
    (
        "speculation { max_draft_tokens: 1 } contrastive { top_k: 4 penalty_alpha: 0 }",
        "speculation.max_draft_tokens",
        1,
    ),
    ("speculation { proposer: SPECULATION_PROPOSER_OFF } beam { width: 2 }", "speculation", SpeculationWish("off")),
    (
        "speculation { proposer: SPECULATION_PROPOSER_PROMPT_LOOKUP max_draft_tokens: 32 adaptive: false }"
        " best_of { candidates: 2 }",
        "speculation",
        SpeculationWish("prompt_lookup", 32, False),
    ),
    (
        "speculation { proposer: SPECULATION_PROPOSER_DRAFT_MODEL adaptive: true } structured_output { regex: 'a' }",
        "speculation",
        SpeculationWish("draft_model"),
    ),
    ("", "stopping.max_new_tokens", None),
    ("stopping { max_new_tokens: 1 min_new_tokens: 1 }", "stopping.max_new_tokens", 1),
    ("stopping { min_new_tokens: 9 }", "stopping.min_new_tokens", 9),
    ('stopping { stop: ["a", "ä"] }', "stopping.stop", ("a", "ä")),
    ('stopping { stop: "' + "ä" * 256 + '" }', "stopping.stop", ("ä" * 256,)),
    ("stopping { stop_token_ids: [0, 210] }", "stopping.stop_token_ids", (0, 210)),
    ("stopping { ignore_eos: true }", "stopping.ignore_eos", True),
    ("stopping { time_limit { seconds: 1 nanos: 500000000 } }", "stopping.time_limit", 1.5),
    ("stopping { time_limit { seconds: 86400 } }", "stopping.time_limit", 86400.0),
    ("", "stopping.time_limit", None),
    ("", "sampling.structured_output", None),
    ('structured_output { json_schema: "{}" }', "sampling.structured_output", StructuredOutput("json_schema", "{}")),
    ("structured_output { json_object: true }", "sampling.structured_output", StructuredOutput("json_object")),
    (
        'structured_output { regex: "a+" skip_forced: true } stopping { min_new_tokens: 1 }',
        "sampling.structured_output",
        StructuredOutput("regex", "a+", True),
    ),
    (
        'structured_output { choice { values: ["ä", "b\\""] } }',
        "sampling.structured_output",
        StructuredOutput("choice", '["\\u00e4", "b\\""]'),
    ),
    (
        'structured_output { grammar: "start: x" }',
        "sampling.structured_output",
        StructuredOutput("grammar", "start: x"),
    ),
    ("", "response.logprobs", None),
    ("response { logprobs: 0 }", "response.logprobs", 0),
    ("response { logprobs: 20 }", "response.logprobs", 20),
    ("response { prompt_logprobs: true }", "response.prompt_logprobs", True),
    ("response { include_prompt: true }", "response.include_prompt", True),
    ("response { include_stop: true }", "response.include_stop", True),
    ("response { entropy: true logprobs: 0 }", "response.entropy", True),
    ("priority: -1000", "priority", -1000),
    ("priority: 1000", "priority", 1000),
    ('cache_salt: "' + "ä" * 128 + '"', "cache_salt", "ä" * 128),
]

REFUSED = runpy.run_path(str(Path(__file__).with_name("refused_specs.py")))["refused"](VOCAB)


@pytest.mark.parametrize(("text", "path", "value"), ACCEPTED)
def test_accepted(text: str, path: str, value: object) -> None:
    found: Any = convert_spec(text)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("text", "path", "words"), REFUSED)
def test_refused(text: str, path: str, words: str) -> None:
    with pytest.raises(InvalidField) as caught:
        convert_spec(text)
    assert caught.value.fields["field"] == path
    assert path in caught.value.message
    assert words in caught.value.message
    assert len(caught.value.message) < 300


def leaves(descriptor: Descriptor, path: str = "") -> set[str]:
    """Names of all fields of a message and of the messages in it, from the root on."""
    found = set()
    for field in descriptor.fields:
        below = f"{path}.{field.name}" if path else field.name
        nested = field.message_type
        if nested is None or nested.GetOptions().map_entry or nested.file != descriptor.file:
            found.add(below)
        else:
            found |= leaves(nested, below)
    return found


def test_the_tables_hold_every_field() -> None:
    """A field that is added to the contract must be honoured or refused, and be tested here."""
    touched = set()
    for text in (row[0] for row in [*ACCEPTED, *REFUSED]):

        def walk(message: Any, path: str = "") -> None:
            for field, value in message.ListFields():
                below = f"{path}.{field.name}" if path else field.name
                nested = field.message_type
                if nested is None or nested.GetOptions().map_entry or nested.file != message.DESCRIPTOR.file:
                    touched.add(below)
                else:
                    for item in [value] if hasattr(value, "ListFields") else value:
                        walk(item, below)

        walk(spec(text))
    assert leaves(gn.GenerationSpec.DESCRIPTOR) <= touched


def test_prompt_and_spec_are_required() -> None:
    for message, present, path in ((gn.GenerationSpec(), True, "spec.prompt"), (spec(""), False, "spec")):
        with pytest.raises(InvalidField) as caught:
            convert.generation(message, present, VOCAB, None)
        assert caught.value.fields["field"] == path


def test_seed_and_id_are_drawn() -> None:
    first, second = convert_spec(""), convert_spec("")
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id
    assert convert_spec("", deadline=12.5).deadline == 12.5


def text_of(message_type: Any, text: str) -> Any:
    return text_format.Parse(text, message_type())


@pytest.mark.parametrize(
    ("call", "message_type", "text", "path"),
    [
        (lambda m: convert.score(m, VOCAB), gn.ScoreRequest, "continuation { ids: 1 }", "prompt"),
        (lambda m: convert.score(m, VOCAB), gn.ScoreRequest, 'text: "" continuation { ids: 1 }', "text"),
        (lambda m: convert.score(m, VOCAB), gn.ScoreRequest, "token_ids { }", "token_ids.ids"),
        (lambda m: convert.score(m, VOCAB), gn.ScoreRequest, "token_ids { ids: 211 }", "token_ids.ids[0]"),
        (lambda m: convert.score(m, VOCAB), gn.ScoreRequest, 'text: "x"', "continuation.ids"),
        (
            lambda m: convert.score(m, VOCAB),
            gn.ScoreRequest,
            'text: "x" continuation { ids: [1, 211] }',
            "continuation.ids[1]",
        ),
        (
            lambda m: convert.score(m, VOCAB),
            gn.ScoreRequest,
            'text: "x" continuation { ids: 1 } adapters { id: "a" weight: nan }',
            "adapters[0].weight",
        ),
        (convert.tokenize, gn.TokenizeRequest, "", "prompt"),
        (convert.tokenize, gn.TokenizeRequest, "chat { }", "chat.messages"),
        (
            convert.tokenize,
            gn.TokenizeRequest,
            'chat { messages { role: "user" } } add_special_tokens: false',
            "add_special_tokens",
        ),
        (lambda m: convert.detokenize(m, VOCAB), gn.DetokenizeRequest, "token_ids: 211", "token_ids[0]"),
        (convert.load_adapter, ad.LoadAdapterRequest, 'path: "p"', "id"),
        (convert.load_adapter, ad.LoadAdapterRequest, 'id: "../a" path: "p"', "id"),
        (convert.load_adapter, ad.LoadAdapterRequest, 'id: "a"', "path"),
        (convert.load_adapter, ad.LoadAdapterRequest, 'id: "a" path: "a\\000b"', "path"),
        (convert.load_adapter, ad.LoadAdapterRequest, f'id: "a" path: "{"x" * 4097}"', "path"),
        (
            convert.load_adapter,
            ad.LoadAdapterRequest,
            'id: "a" path: "p" expected_revision: "12"',
            "expected_revision",
        ),
        (convert.update_adapter, ad.UpdateAdapterRequest, 'id: "a"', "pinned"),
        (convert.update_adapter, ad.UpdateAdapterRequest, 'id: "ä" pinned: true', "id"),
        (convert.page, ad.ListAdaptersRequest, "page_size: 0", "page_size"),
        (convert.page, ad.ListAdaptersRequest, "page_size: 1001", "page_size"),
        (convert.page, ad.ListAdaptersRequest, 'page_token: "a b"', "page_token"),
        (convert.watch, ad.WatchAdaptersRequest, 'ids: ["a", ""]', "ids[1]"),
        (convert.drain, ct.DrainRequest, "timeout { seconds: -1 }", "timeout"),
        (convert.drain, ct.DrainRequest, "timeout { seconds: 86401 }", "timeout"),
    ],
)
def test_other_requests_are_refused(call: Any, message_type: Any, text: str, path: str) -> None:
    with pytest.raises(InvalidField) as caught:
        call(text_of(message_type, text))
    assert caught.value.fields["field"] == path


def test_float32_shows_as_it_was_written() -> None:
    """1.1 crosses the wire as 1.10000002384; nobody wrote that."""
    message = spec("sampling { top_p: 1.1 }")
    assert not math.isclose(message.sampling.top_p, 1.1, rel_tol=1e-9)
    with pytest.raises(InvalidField, match=r"is 1\.1;"):
        convert.generation(message, True, VOCAB, None)
