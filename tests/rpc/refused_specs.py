"""Specs that must be refused, one or more for every field of the contract; shared by the tests of the room and of the
whole server, which load this file by its path."""

from __future__ import annotations

REVISION = "0123456789abcdef" * 4

_NO_ROLE = 'chat { messages { role: "u" } messages { role: "" } }'
_NINE = " ".join(f'adapters {{ id: "a{index}" }}' for index in range(9))
_BIASES = " ".join(f"logit_bias {{ key: {index} value: 1 }}" for index in range(1025))


def refused(vocab: int) -> list[tuple[str, str, str]]:
    """Rows for a model with `vocab` tokens: a spec in protobuf's text format, the path that the refusal names, words of
    its message. A spec without a prompt is meant to get one."""
    last = vocab - 1
    return [
        ('request_id: "a b"', "spec.request_id", "'a b'"),
        ('request_id: "ä"', "spec.request_id", "visible ASCII"),
        ('request_id: "' + "r" * 129 + '"', "spec.request_id", "1 to 128"),
        ('text: ""', "spec.text", "at least one character"),
        ("token_ids { }", "spec.token_ids.ids", "at least one"),
        (
            f"token_ids {{ ids: [{last}, {vocab}] }}",
            "spec.token_ids.ids[1]",
            f"is {vocab}; accepted: token ids 0 to {last}",
        ),
        ("token_ids { ids: 4294967295 }", "spec.token_ids.ids[0]", "4294967295"),
        ("chat { }", "spec.chat.messages", "at least one message"),
        (_NO_ROLE, "spec.chat.messages[1].role", "role"),
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
        (f"sampling {{ top_k: {vocab + 1} }}", "spec.sampling.top_k", f"is {vocab + 1}; accepted: 0 to {vocab}"),
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
        (
            f"sampling {{ logit_bias {{ key: {vocab} value: 1 }} }}",
            f"spec.sampling.logit_bias[{vocab}]",
            f"0 to {last}",
        ),
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
        (f"stopping {{ stop_token_ids: [1, {vocab}] }}", "spec.stopping.stop_token_ids[1]", f"0 to {last}"),
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
        ("structured_output { }", "spec.structured_output", "one of json_schema"),
        ('structured_output { json_schema: "" }', "spec.structured_output.json_schema", "1 to 262144"),
        ("structured_output { json_object: false }", "spec.structured_output.json_object", "is False; accepted: true"),
        ('structured_output { regex: "' + "a" * 16385 + '" }', "spec.structured_output.regex", "has 16385 characters"),
        ("structured_output { choice { } }", "spec.structured_output.choice.values", "1 to 1024"),
        ('structured_output { choice { values: ["a", ""] } }', "spec.structured_output.choice.values[1]", "1 to 4096"),
        ('structured_output { choice { values: ["a", "a"] } }', "spec.structured_output.choice.values[1]", "twice"),
        ('structured_output { grammar: "" }', "spec.structured_output.grammar", "1 to 262144"),
        (
            'structured_output { regex: "a" } stopping { ignore_eos: true }',
            "spec.stopping.ignore_eos",
            "says where the answer ends",
        ),
        (
            'structured_output { regex: "a" skip_forced: true } response { logprobs: 0 }',
            "spec.structured_output.skip_forced",
            "response.logprobs",
        ),
        ("response { logprobs: 21 }", "spec.response.logprobs", "0 to 20"),
        ("priority: 1001", "spec.priority", "-1000 to 1000"),
        ("priority: -1001", "spec.priority", "-1000 to 1000"),
        ('cache_salt: "' + "ä" * 129 + '"', "spec.cache_salt", "256 bytes"),
    ]
