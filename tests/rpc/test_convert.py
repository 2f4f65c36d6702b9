"""Every field of the contract: what it becomes, and what is refused in its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor import Descriptor

from lorry.server.engine.messages import AdapterRef
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
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
    ("sampling { typical_p: 1 }", "sampling.top_p", 1.0),
    ("sampling { seed: 18446744073709551615 }", "sampling.seed", 2**64 - 1),
    ("sampling { seed: 0 }", "sampling.seed", 0),
    ("sampling { repetition_penalty: 0.25 }", "sampling.repetition_penalty", 0.25),
    ("", "sampling.repetition_penalty", 1.0),
    ("sampling { presence_penalty: -2 }", "sampling.presence_penalty", -2.0),
    ("sampling { frequency_penalty: 2 }", "sampling.frequency_penalty", 2.0),
    ("sampling { logit_bias { key: 210 value: -100 } }", "sampling.logit_bias", {210: -100.0}),
    ("sampling { n: 16 }", "sampling.n", 16),
    ("", "sampling.n", 1),
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
    ("", "response.logprobs", None),
    ("response { logprobs: 0 }", "response.logprobs", 0),
    ("response { logprobs: 20 }", "response.logprobs", 20),
    ("response { prompt_logprobs: true }", "response.prompt_logprobs", True),
    ("response { include_prompt: true }", "response.include_prompt", True),
    ("response { include_stop: true }", "response.include_stop", True),
    ("priority: -1000", "priority", -1000),
    ("priority: 1000", "priority", 1000),
    ('cache_salt: "' + "ä" * 128 + '"', "cache_salt", "ä" * 128),
]

_ROLE = 'chat {{ messages {{ role: "u" }} messages {{ role: "{}" }} }}'
_NINE = " ".join(f'adapters {{ id: "a{index}" }}' for index in range(9))
_BIASES = " ".join(f"logit_bias {{ key: {index} value: 1 }}" for index in range(1025))

# What the client wrote, the path that is named, words of the message.
REFUSED: list[tuple[str, str, str]] = [
    ('request_id: "a b"', "spec.request_id", "'a b'"),
    ('request_id: "ä"', "spec.request_id", "visible ASCII"),
    ('request_id: "' + "r" * 129 + '"', "spec.request_id", "1 to 128"),
    ('text: ""', "spec.text", "at least one character"),
    ("token_ids { }", "spec.token_ids.ids", "at least one"),
    ("token_ids { ids: [210, 211] }", "spec.token_ids.ids[1]", "is 211; accepted: token ids 0 to 210"),
    ("token_ids { ids: 4294967295 }", "spec.token_ids.ids[0]", "4294967295"),
    ("chat { }", "spec.chat.messages", "at least one message"),
    (_ROLE.format(""), "spec.chat.messages[1].role", "role"),
    (_NINE, "spec.adapters", "names 9 adapters; accepted: at most 8"),
    ('adapters { id: "" }', "spec.adapters[0].id", "1 to 64"),
    ('adapters { id: "a" } adapters { id: "a/b" }', "spec.adapters[1].id", "'a/b'"),
    ('adapters { id: "' + "a" * 65 + '" }', "spec.adapters[0].id", "1 to 64"),
    ('adapters { id: "a\\n" }', "spec.adapters[0].id", "1 to 64"),
    ('adapters { id: "a" } adapters { id: "a" }', "spec.adapters[1].id", "no id twice"),
    ('adapters { id: "a" weight: nan }', "spec.adapters[0].weight", "nan"),
    ('adapters { id: "a" weight: -inf }', "spec.adapters[0].weight", "-inf"),
    ('adapters { id: "a" weight: 1000.5 }', "spec.adapters[0].weight", "1000.5; accepted: -1000 to 1000"),
    ('adapters { id: "a" revision: "" }', "spec.adapters[0].revision", "64 lower-case"),
    (f'adapters {{ id: "a" revision: "{REVISION.upper()}" }}', "spec.adapters[0].revision", "64 lower"),
    ("sampling { temperature: -0.5 }", "spec.sampling.temperature", "is -0.5; accepted: 0 (greedy)"),
    ("sampling { temperature: 0.0001 }", "spec.sampling.temperature", "is 0.0001;"),
    ("sampling { temperature: 100.5 }", "spec.sampling.temperature", "0.001 to 100"),
    ("sampling { temperature: nan }", "spec.sampling.temperature", "nan"),
    ("sampling { temperature: inf }", "spec.sampling.temperature", "inf"),
    ("sampling { top_p: 0 }", "spec.sampling.top_p", "is 0; accepted: above 0, to 1"),
    ("sampling { top_p: 1.1 }", "spec.sampling.top_p", "is 1.1; accepted: above 0, to 1"),
    ("sampling { top_p: -0.1 }", "spec.sampling.top_p", "-0.1"),
    ("sampling { top_p: nan }", "spec.sampling.top_p", "nan"),
    ("sampling { top_k: 212 }", "spec.sampling.top_k", "is 212; accepted: 0 to 211"),
    ("sampling { min_p: 1.5 }", "spec.sampling.min_p", "0 to 1"),
    ("sampling { min_p: -0.5 }", "spec.sampling.min_p", "-0.5"),
    ("sampling { min_p: nan }", "spec.sampling.min_p", "nan"),
    ("sampling { typical_p: 0.5 }", "spec.sampling.typical_p", "not served yet"),
    ("sampling { typical_p: nan }", "spec.sampling.typical_p", "nan"),
    ("sampling { repetition_penalty: 0 }", "spec.sampling.repetition_penalty", "0.01 to 100"),
    ("sampling { repetition_penalty: 101 }", "spec.sampling.repetition_penalty", "101"),
    ("sampling { repetition_penalty: nan }", "spec.sampling.repetition_penalty", "nan"),
    ("sampling { presence_penalty: 2.5 }", "spec.sampling.presence_penalty", "-2 to 2"),
    ("sampling { presence_penalty: nan }", "spec.sampling.presence_penalty", "nan"),
    ("sampling { frequency_penalty: -2.5 }", "spec.sampling.frequency_penalty", "-2 to 2"),
    ("sampling { frequency_penalty: -inf }", "spec.sampling.frequency_penalty", "-inf"),
    ("sampling { logit_bias { key: 211 value: 1 } }", "spec.sampling.logit_bias[211]", "0 to 210"),
    ("sampling { logit_bias { key: 7 value: 101 } }", "spec.sampling.logit_bias[7]", "-100 to 100"),
    ("sampling { logit_bias { key: 7 value: nan } }", "spec.sampling.logit_bias[7]", "nan"),
    ("sampling { " + _BIASES + " }", "spec.sampling.logit_bias", "1025 entries"),
    ("sampling { n: 0 }", "spec.sampling.n", "1 to 16"),
    ("sampling { n: 17 }", "spec.sampling.n", "1 to 16"),
    ("sampling { n: 2 temperature: 0 }", "spec.sampling.n", "greedy sequences of one prompt are equal"),
    ("beam { width: 4 }", "spec.beam", "not served yet"),
    ("beam { length_penalty: 2 }", "spec.beam", "not served yet"),
    ("contrastive { top_k: 4 penalty_alpha: 0.6 }", "spec.contrastive", "not served yet"),
    ("contrastive { }", "spec.contrastive", "not served yet"),
    ("stopping { max_new_tokens: 0 }", "spec.stopping.max_new_tokens", "1 or more"),
    ("stopping { max_new_tokens: 3 min_new_tokens: 4 }", "spec.stopping.min_new_tokens", "0 to 3"),
    ('stopping { stop: "" }', "spec.stopping.stop[0]", "1 to 256"),
    ('stopping { stop: ["a", "' + "b" * 257 + '"] }', "spec.stopping.stop[1]", "1 to 256"),
    ('stopping { stop: ["a", "b", "a"] }', "spec.stopping.stop[2]", "no value twice"),
    (
        "stopping { " + " ".join(f'stop: "{index}"' for index in range(17)) + " }",
        "spec.stopping.stop",
        "at most 16",
    ),
    ("stopping { stop_token_ids: [1, 211] }", "spec.stopping.stop_token_ids[1]", "0 to 210"),
    ("stopping { stop_token_ids: [1, 1] }", "spec.stopping.stop_token_ids[1]", "no value twice"),
    (
        "stopping { " + " ".join(f"stop_token_ids: {index}" for index in range(65)) + " }",
        "spec.stopping.stop_token_ids",
        "at most 64",
    ),
    ("stopping { time_limit { } }", "spec.stopping.time_limit", "above 0"),
    ("stopping { time_limit { seconds: -1 } }", "spec.stopping.time_limit", "above 0 to 86400 seconds"),
    ("stopping { time_limit { seconds: 86400 nanos: 1 } }", "spec.stopping.time_limit", "86400"),
    ("stopping { time_limit { seconds: 1 nanos: -1 } }", "spec.stopping.time_limit", "sign"),
    ("stopping { time_limit { nanos: 1000000000 } }", "spec.stopping.time_limit", "nanos"),
    ("response { logprobs: 21 }", "spec.response.logprobs", "0 to 20"),
    ("priority: 1001", "spec.priority", "-1000 to 1000"),
    ("priority: -1001", "spec.priority", "-1000 to 1000"),
    ('cache_salt: "' + "ä" * 129 + '"', "spec.cache_salt", "256 bytes"),
]


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
