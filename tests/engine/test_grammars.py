"""Structured output through the engine: a tiny random Llama over the default model's vocabulary."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.server.config import MIB, EngineConfig
from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.engine.build import grammar_desk
from lorry.server.engine.grammars import GrammarDesk
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import (
    Abort,
    AdapterRef,
    FinishReason,
    Generate,
    SamplingParams,
    Stats,
    StoppingParams,
)
from lorry.server.errors import InvalidField
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model
from lorry.server.params import BeamSearch, ContrastiveSearch, DoLa, Speculation, StructuredOutput

VOCAB, EOS = 49_152, 2
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "eos_token_id": EOS,
}
DATE = StructuredOutput("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
LONG = StructuredOutput("regex", "([a-f]{3}[0-9]{3} ){12}end")
POINT = {
    "type": "object",
    "properties": {
        "first_coordinate": {"type": "integer", "minimum": -99, "maximum": 99},
        "kind_of_the_point": {"enum": ["inner", "outer"]},
        "remarks": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["first_coordinate", "kind_of_the_point", "remarks"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return load_model(str(folder))


@pytest.fixture(scope="module")
def desk(wide: Decoder, smollm2_folder: Path) -> GrammarDesk:
    return grammar_desk(smollm2_folder, wide)


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def adapters(wide: Decoder, write_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        write_adapter(folder / name, wide, 8, seed)
    return folder


Build = Callable[..., LocalEngine]


@pytest.fixture
def engine_of(wide: Decoder, desk: GrammarDesk, adapters: Path) -> Iterator[Build]:
    engines: list[LocalEngine] = []

    def make(blocks: int = 200, draft: Decoder | None = None, **changes: Any) -> LocalEngine:
        model = wide.config
        settings: dict[str, Any] = {
            "kv_dtype": "float32",
            "adapter_dtype": "float32",
            "adapter_memory": 4 * MIB,
            "adapters_dir": str(adapters),
            "kv_memory": blocks * 2 * model.layers * model.kv_heads * 16 * model.head_dim * 4,
            "max_running": 16,
            "token_budget": 64,
            "debug_checks": True,
        }
        engine = LocalEngine(wide, EngineConfig(**settings | changes), grammars=desk, draft=draft)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.engine.check()
        assert engine.engine.scheduler.allocator.used == 0
        engine.close()


def request(name: str, wanted: StructuredOutput | None, new: int = 120, **rest: Any) -> Generate:
    names = ("temperature", "seed", "n", "top_p", "dola", "repetition_penalty", "presence_penalty", "frequency_penalty")
    sampling = {key: rest.pop(key) for key in (*names, "allowed_token_ids") if key in rest}
    stopping = {key: rest.pop(key) for key in ("min_new_tokens", "stop_token_ids") if key in rest}
    prompt = rest.pop("prompt", [7, 11, 300, 4000])
    adapters = tuple(AdapterRef(each) for each in rest.pop("adapters", ""))
    return Generate(
        name,
        prompt,
        SamplingParams(structured_output=wanted, **sampling),
        StoppingParams(new, **stopping),
        adapters,
        **rest,
    )


def schema(skip_forced: bool = False) -> StructuredOutput:
    return StructuredOutput("json_schema", json.dumps(POINT), skip_forced)


def test_every_answer_is_a_text_of_its_language(engine_of: Build, tokenizer: Tokenizer) -> None:
    """Greedy and sampled, with and without adapters, n > 1, beside plain rows, and the same alone as in the batch."""
    cases: list[dict[str, Any]] = [
        {"wanted": DATE, "temperature": 0.0},
        {"wanted": DATE, "seed": 3, "adapters": "a", "n": 3},
        {"wanted": schema(), "seed": 4, "adapters": "ab", "top_p": 0.9},
        {"wanted": schema(), "temperature": 20.0, "seed": 5, "logprobs": 2},
        {"wanted": schema(True), "seed": 6, "adapters": "b", "n": 2},
        {"wanted": None, "seed": 7, "new": 9},
        {"wanted": StructuredOutput("choice", '["yes", "no, never"]'), "seed": 8, "min_new_tokens": 60},
        {"wanted": LONG, "seed": 9, "adapters": "a"},
    ]
    messages = [request(f"r{place}", **case) for place, case in enumerate(cases)]
    engine = engine_of()
    together = engine.generate(*messages)
    for case, message, answer in zip(cases, messages, together, strict=True):
        assert answer.error is None
        for index, completion in sorted(answer.completions.items()):
            if case["wanted"] is None:
                assert completion.finish is FinishReason.LENGTH
                continue
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            assert completion.finish is FinishReason.EOS, text
            assert completion.token_ids[-1] == EOS
            if case["wanted"].kind == "regex":
                assert re.fullmatch(case["wanted"].text, text)
            elif case["wanted"].kind == "choice":
                assert text in ("yes", "no, never")
            else:
                jsonschema.validate(json.loads(text), POINT)
            if "logprobs" in case:
                assert len(completion.logprobs) == len(completion.token_ids)
            assert index < case.get("n", 1)
        assert len(answer.completions) == case.get("n", 1)
        alone = engine_of().generate(message)[0]
        assert {i: c.token_ids for i, c in alone.completions.items()} == {
            i: c.token_ids for i, c in answer.completions.items()
        }


def test_speculation_changes_no_token(engine_of: Build, wide: Decoder) -> None:
    """Nor do several sequences and adapters; what is proposed is of the language, and forced tokens are left alone."""
    cases: list[dict[str, Any]] = [
        {"wanted": DATE, "temperature": 0.0},
        {"wanted": schema(), "seed": 4, "n": 2},
        {"wanted": LONG, "seed": 9, "adapters": "a"},
        {"wanted": LONG, "seed": 10, "temperature": 0.3},
        {"wanted": schema(True), "seed": 6},
    ]
    messages = [request(f"r{place}", **case) for place, case in enumerate(cases)]
    expected = [answer.completions for answer in engine_of().generate(*messages)]
    for proposer in ("prompt_lookup", "draft_model"):
        wanted = Speculation(proposer, 5, adaptive=False)
        engine = engine_of(draft=wide)
        sampling = [msgspec.structs.replace(each.sampling, speculation=wanted) for each in messages]
        again = [msgspec.structs.replace(each, sampling=new) for each, new in zip(messages, sampling, strict=True)]
        for answer, plain in zip(engine.generate(*again), expected, strict=True):
            assert answer.error is None, answer.error
            assert {i: c.token_ids for i, c in answer.completions.items()} == {i: c.token_ids for i, c in plain.items()}
        engine.engine._send(idle=True)
        engine.step()
        accepted = sum(sum(each.accepted.values()) for each in engine.messages if isinstance(each, Stats))
        assert accepted > (50 if proposer == "draft_model" else 0)


def test_preemption_changes_nothing(engine_of: Build, tokenizer: Tokenizer) -> None:
    messages = [request(f"p{seed}", LONG, 150, seed=seed, prompt=list(range(9, 40))) for seed in range(5)]
    roomy, tight = engine_of(blocks=200), engine_of(blocks=17)
    wanted = [answer.tokens() for answer in roomy.generate(*messages)]
    found = [answer.tokens() for answer in tight.generate(*messages)]
    assert tight.engine.scheduler.preemptions > 0
    assert found == wanted
    assert all(re.fullmatch(LONG.text, tokenizer.decode(each)) for each in found)


class OneByOne(Strategy):
    """Chooses what another strategy does, but appends it in as many steps as it has tokens."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.queues: dict[int, list[int]] = {}

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        chosen = []
        for place, row in enumerate(rows):
            queue = self.queues.setdefault(row.key, [])
            if not queue:
                (way,) = self.inner.decide([row], logits[place : place + 1].clone())
                queue += way.token_ids
            chosen.append(Continuation(place, (queue.pop(0),)))
        return chosen

    def release(self, key: int) -> None:
        self.inner.release(key)


@pytest.mark.parametrize("blocks", [200, 14])
def test_skipped_text_is_computed_like_a_prompt(blocks: int, engine_of: Build, tokenizer: Tokenizer) -> None:
    """What is drawn behind it is what is drawn where its tokens came one by one; also when its blocks have to be
    fought for, and when two sequences share the block that it begins in."""
    wanted = StructuredOutput(
        "regex", r"(inner|outer)( point, with remarks: [a-z]{3}){3} and with [a-z]{5} remarks", True
    )
    messages = [
        request(f"s{seed}", [schema(True), wanted][seed % 2], 150, seed=seed, n=2, prompt=[*range(20, 45)])
        for seed in range(4)
    ]
    found, steps = [], []
    for skipping in (True, False):
        engine = engine_of(blocks=blocks if skipping else 200)
        if not skipping:
            engine.engine.committer.strategy = OneByOne(engine.engine.committer.strategy)
        engine.send(*messages)
        count = 0
        while engine.step() or engine.engine.scheduler.requests or engine.engine.grammars.busy:
            count += 1
        steps.append(count)
        answers = [engine.answers[message.request_id] for message in messages]
        found.append([{index: c.token_ids for index, c in answer.completions.items()} for answer in answers])
        assert (engine.engine.scheduler.preemptions > 0) == (skipping and blocks < 200)
        for place, answer in enumerate(answers):
            for completion in answer.completions.values():
                text = tokenizer.decode(completion.token_ids)
                if place % 2:
                    assert re.fullmatch(wanted.text, text)
                else:
                    jsonschema.validate(json.loads(text), POINT)
    assert found[0] == found[1]
    assert blocks < 200 or steps[0] < 0.8 * steps[1], steps


def test_what_ends_an_answer_early(engine_of: Build, tokenizer: Tokenizer) -> None:
    dash = tokenizer.token_to_id("-")
    cut, stopped, alone = engine_of().generate(
        request("cut", LONG, 5, seed=1),
        request("stop", DATE, stop_token_ids=(dash,), seed=1),
        request("min", DATE, stop_token_ids=(dash,), min_new_tokens=99, seed=1),
    )
    assert (cut.completions[0].finish, len(cut.tokens())) == (FinishReason.LENGTH, 5)
    assert stopped.completions[0].finish is FinishReason.STOP
    assert re.fullmatch("[0-9]{4}-", tokenizer.decode(stopped.tokens()))
    assert isinstance(alone.error, InvalidField)  # it must not be written, and nothing else may


def test_other_requests_go_on_while_a_grammar_is_compiled(engine_of: Build, desk: GrammarDesk) -> None:
    names = {f"property_{i}": {"type": "string"} for i in range(400)}
    slow = StructuredOutput("json_schema", json.dumps({"type": "object", "properties": names}))
    engine = engine_of()
    engine.send(request("plain", None, 250, seed=2))
    for _ in range(3):
        engine.step()
    engine.send(request("slow", slow, 4, seed=2))
    before = len(engine.answers["plain"].tokens())
    while engine.answers["slow"].started is None:
        engine.step()
    assert len(engine.answers["plain"].tokens()) > before + 1
    assert desk.library is not None and desk.library.find(slow) is not None
    engine.send(Abort("plain"))
    engine.run()

    def hits() -> int:
        return desk.hits + sum(each.grammar_hits for each in engine.messages if isinstance(each, Stats))

    before = hits()
    engine.run(request("again", slow, 4))
    assert hits() == before + 1


def test_an_abort_overtakes_no_grammar(engine_of: Build) -> None:
    engine = engine_of()
    engine.run(request("gone", StructuredOutput("regex", "unheard of"), seed=2, n=2), Abort("gone"))
    answer = engine.answers["gone"]
    assert [c.finish for c in answer.completions.values()] == [FinishReason.ABORTED] * 2
    assert answer.started is None


def test_a_grammar_that_is_not_served_fails_its_request_alone(engine_of: Build) -> None:
    bad, good = engine_of().generate(
        request("bad", StructuredOutput("json_schema", '{"not": {}}')), request("good", DATE, seed=1)
    )
    assert isinstance(bad.error, InvalidField)
    assert bad.error.fields["field"] == "structured_output.json_schema"
    assert good.error is None and good.completions[0].finish is FinishReason.EOS


def test_a_model_without_a_vocabulary_refuses_all(build: Any, generate: Any, tmp_path: Path, decoder: Decoder) -> None:
    engine: LocalEngine = build()
    answer, plain = engine.generate(request("r", DATE), generate("plain", [3, 4]))
    assert isinstance(answer.error, InvalidField) and "tokenizer" in answer.error.message
    assert plain.error is None
    assert grammar_desk(tmp_path, decoder).library is None


def test_the_operator_sees_grammars(engine_of: Build) -> None:
    engine = engine_of()
    engine.send(request("seen", StructuredOutput("regex", "[a-z]{30} seen"), seed=1))
    deadline = time.monotonic() + 30
    while engine.answers["seen"].started is None and time.monotonic() < deadline:
        engine.step()
    engine.engine.report._next = 0.0
    engine.step()
    stats = [message for message in engine.messages if isinstance(message, Stats)]
    assert any(each.grammar_rows == 1 for each in stats)
    assert any(h.name == "grammar_compile_seconds" for each in stats for h in each.histograms)
    engine.run()


@pytest.mark.parametrize(
    "search", [BeamSearch(4), BeamSearch(4, groups=2, diversity_penalty=0.5), ContrastiveSearch(4, 0.5)]
)
@pytest.mark.parametrize("wanted", [DATE, StructuredOutput("choice", '["yes", "no", "perhaps not"]')], ids=str)
def test_searches_stay_within_a_grammar(
    engine_of: Build, tokenizer: Tokenizer, search: BeamSearch | ContrastiveSearch, wanted: StructuredOutput
) -> None:
    message = Generate(
        "s",
        tokenizer.encode("When was it?").ids,
        SamplingParams(
            temperature=0.0, n=2 if isinstance(search, BeamSearch) else 1, search=search, structured_output=wanted
        ),
        StoppingParams(40),
    )
    answer = engine_of().generate(message)[0]
    assert answer.error is None, answer.error
    texts = []
    for completion in answer.completions.values():
        assert completion.finish is FinishReason.EOS
        texts.append(tokenizer.decode(completion.token_ids, skip_special_tokens=True))
    pattern = wanted.text if wanted.kind == "regex" else "|".join(json.loads(wanted.text))
    assert all(re.fullmatch(pattern, text) for text in texts), texts


def contrasting(dola: DoLa | None) -> list[Generate]:
    """Requests under DoLa and a grammar."""
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.3}
    codes = StructuredOutput("regex", "([a-f]{3}[0-9]{3} ){3}end")
    cases: list[dict[str, Any]] = [
        {"wanted": DATE, "temperature": 0.0, "adapters": "b", "logprobs": 1},
        {"wanted": codes, "temperature": 1.5, "seed": 2, "n": 3, **penalties},
        {"wanted": codes, "temperature": 1.5, "seed": 3, "adapters": "a", "top_p": 0.9},
        {"wanted": schema(), "temperature": 0.0},
        {"wanted": schema(), "temperature": 1.5, "seed": 4, "adapters": "ab", "n": 2, **penalties},
        {"wanted": schema(True), "temperature": 1.5, "seed": 6, "n": 2},
    ]
    return [request(f"d{place}", dola=dola, **case) for place, case in enumerate(cases)]


def tokens_of(answers: Sequence[Any]) -> list[dict[int, list[int]]]:
    assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
    return [{index: each.token_ids for index, each in sorted(answer.completions.items())} for answer in answers]


def test_contrasted_layers_stay_within_a_grammar(engine_of: Build, tokenizer: Tokenizer) -> None:
    """Alone and beside others, who keep their tokens, whether or not what is allowed is in the head."""
    contrasted = contrasting(DoLa((0, 1)))
    others = [
        request("plain", None, 15, seed=7, n=2),
        request("date", DATE, seed=8, temperature=1.5),
        request("schema", schema(True), seed=9, adapters="b"),
        request("free", None, 12, seed=10, n=2, dola=DoLa((1,)), presence_penalty=0.5),
    ]
    together = engine_of(max_running=32).generate(*contrasted, *others)
    found = tokens_of(together)
    for message, answer in zip(contrasted, together, strict=False):
        wanted = message.sampling.structured_output
        assert wanted is not None and len(answer.completions) == message.sampling.n
        for completion in answer.completions.values():
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            assert completion.finish is FinishReason.EOS, text
            if wanted.kind == "regex":
                assert re.fullmatch(wanted.text, text), text
            else:
                jsonschema.validate(json.loads(text), POINT)
    engine = engine_of()
    assert [tokens_of(engine.generate(message))[0] for message in (*contrasted, *others)] == found
    assert tokens_of(engine_of().generate(*others)) == found[len(contrasted) :]
    assert tokens_of(engine_of().generate(*contrasting(None)[:4])) != found[:4]


def test_of_what_a_grammar_leaves_the_contrast_decides(engine_of: Build, tokenizer: Tokenizer) -> None:
    """Token by token what the same contrast takes of the tokens that the place has."""
    digits = tuple(sorted(token for text, token in tokenizer.get_vocab().items() if re.fullmatch("[0-9]+", text)))
    dashes = (tokenizer.token_to_id("-"),)
    assert len(digits) == 10  # no token has two of them
    engine = engine_of()
    for seed in range(3):
        prompt = [*range(9 + 50 * seed, 20 + 50 * seed)]
        for dola in (DoLa((0, 1)), DoLa((1,))):
            (answer,) = tokens_of(engine.generate(request("d", DATE, temperature=0.0, prompt=prompt, dola=dola)))
            *tokens, end = answer[0]
            assert len(tokens) == 10 and end == EOS
            each = [
                request(
                    f"t{place}",
                    None,
                    1,
                    temperature=0.0,
                    prompt=prompt + tokens[:place],
                    dola=dola,
                    allowed_token_ids=dashes if place in (4, 7) else digits,
                )
                for place in range(10)
            ]
            assert [one[0] for one in tokens_of(engine.generate(*each))] == [[token] for token in tokens]
