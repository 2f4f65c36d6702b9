"""Speculation through the engine: the same tokens as without it, whoever proposes and whatever happens meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.server.config import MIB, EngineConfig
from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.engine.messages import Abort, FinishReason, Generate, Stats
from lorry.server.errors import InvalidField
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model
from lorry.server.params import BeamSearch, Mirostat, Speculation

SMALLER = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 200,
    "eos_token_id": 1,
}
ALWAYS = {proposer: Speculation(proposer, 6, adaptive=False) for proposer in ("prompt_lookup", "draft_model")}
FEW = {"allowed_token_ids": (5, 9, 14)}  # in which a text soon repeats itself
DRAWN: dict[str, Any] = {"temperature": 0.6, "shaping": {"top_p": 0.95, **FEW}}


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A draft model that knows nothing of the large one."""
    folder = tmp_path_factory.mktemp("smaller")
    torch.manual_seed(11)
    LlamaForCausalLM(LlamaConfig(**SMALLER)).save_pretrained(folder)
    with torch.inference_mode():
        return load_model(str(folder))


@pytest.fixture
def drafting(decoder: Decoder, adapters_dir: Path) -> Iterator[Callable[..., LocalEngine]]:
    engines: list[LocalEngine] = []

    def make(draft: Decoder, blocks: int = 400, **changes: Any) -> LocalEngine:
        models = (decoder.config, draft.config)
        config: dict[str, Any] = {
            "kv_dtype": "float32",
            "adapter_dtype": "float32",
            "adapter_memory": 8 * MIB,
            "adapters_dir": str(adapters_dir),
            "kv_memory": blocks * 32 * 4 * sum(each.layers * each.kv_heads * each.head_dim for each in models),
            "max_running": 16,
            "token_budget": 64,
            "debug_checks": True,
        }
        engine = LocalEngine(decoder, EngineConfig(**config | changes), draft=draft)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.engine.check()
        assert engine.engine.scheduler.allocator.used == 0
        engine.close()


def repetitive(length: int, seed: int = 0) -> list[int]:
    """A prompt that says the same several times, with small changes."""
    draw = random.Random(seed * 1000 + length)
    phrase = draw.choices(range(2, 131), k=7)
    text: list[int] = []
    while len(text) < length:
        text += [*phrase, draw.randrange(2, 131)]
    return text[:length]


def requests_of_all_kinds(generate: Any) -> list[Generate]:
    return [
        generate("greedy", repetitive(40), 40, shaping=FEW),
        generate("drawn", repetitive(33, 1), 40, **DRAWN, seed=3),
        generate("adapter", repetitive(47, 2), 30, adapters={"c": 1.0}, shaping=FEW),
        generate("mix", repetitive(20, 3), 30, adapters={"a": 0.5, "b": -0.25}, **DRAWN, seed=4),
        generate("three", repetitive(18, 4), 25, n=3, adapters={"e": 1.0}, **DRAWN, seed=5),
        generate("penalties", repetitive(25, 5), 30, shaping={"repetition_penalty": 1.2, "frequency_penalty": 0.3}),
        generate("logprobs", repetitive(25, 6), 20, logprobs=2, prompt_logprobs_from=1, shaping=FEW),
        generate("few", repetitive(30, 7), 3),
        generate("one", repetitive(30, 8), 1),
    ]


def with_speculation(request: Generate, wanted: Speculation | None) -> Generate:
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, speculation=wanted))


def told(answer: Answer) -> dict[int, tuple[list[int], FinishReason | None]]:
    assert answer.error is None, answer.error
    return {index: (each.token_ids, each.finish) for index, each in answer.completions.items()}


def counts(engine: LocalEngine) -> tuple[int, int]:
    stats = [message for message in engine.messages if isinstance(message, Stats)]
    return tuple(sum(sum(getattr(each, name).values()) for each in stats) for name in ("drafted", "accepted"))  # type: ignore[return-value]


def settle(engine: LocalEngine) -> None:
    """Have the last Stats sent."""
    engine.engine._send(idle=True)
    engine.step()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", [{}, {"blocks": 16}, {"token_budget": 17}])
def test_prompt_lookup_changes_no_token(build: Any, generate: Any, settings: dict[str, Any], ahead: bool) -> None:
    """Nor do adapters, several sequences, little memory, and a step that runs ahead of the host; half of the rows
    speculate."""
    requests = requests_of_all_kinds(generate)
    plain = [told(answer) for answer in build().generate(*requests)]
    for half in (0, 1):
        engine = build(ahead=ahead, **settings)
        engine.generate(*(generate(f"load {name}", [5], 1, adapters={name: 1.0}) for name in "abce"))
        asked = [ALWAYS["prompt_lookup"] if place % 2 != half else None for place in range(len(requests))]
        answers = engine.generate(*map(with_speculation, requests, asked))
        assert [told(answer) for answer in answers] == plain
        settle(engine)
        drafted, accepted = counts(engine)
        assert drafted > accepted > 20
        if "blocks" in settings:
            assert engine.engine.scheduler.preemptions > 0


def test_logprobs_are_those_of_the_tokens(build: Any, generate: Any) -> None:
    request = requests_of_all_kinds(generate)[6]
    (plain,), (sooner,) = (
        build().generate(with_speculation(request, wanted)) for wanted in (None, ALWAYS["prompt_lookup"])
    )
    for one, other in zip(plain.completions[0].logprobs, sooner.completions[0].logprobs, strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"blocks": 16}, {"token_budget": 17}])
@pytest.mark.parametrize("itself", [False, True])
def test_a_draft_model_changes_no_token(
    drafting: Any, build: Any, decoder: Decoder, smaller: Decoder, generate: Any, itself: bool, settings: dict[str, Any]
) -> None:
    """Neither one that is nearly always wrong nor one that is right where no adapter is."""
    requests = requests_of_all_kinds(generate)
    plain = [told(answer) for answer in build().generate(*requests)]
    engine = drafting(decoder if itself else smaller, **settings)
    answers = engine.generate(*(with_speculation(each, ALWAYS["draft_model"]) for each in requests))
    assert [told(answer) for answer in answers] == plain
    settle(engine)
    drafted, accepted = counts(engine)
    assert drafted > 100 and (accepted > drafted / 4 if itself else accepted < drafted)


def test_a_model_that_drafts_for_itself_saves_steps(drafting: Any, decoder: Decoder, generate: Any) -> None:
    """Also over what it finds in the cache, after other rows' steps, and when it was idle for a while."""
    engine = drafting(decoder)
    plain = [generate("a", repetitive(50), 60, **DRAWN, seed=1), generate("b", repetitive(50), 60, seed=2)]
    expected = [told(answer) for answer in engine.generate(*plain)]
    steps = 0
    for request in plain:
        engine.send(with_speculation(request, ALWAYS["draft_model"]))
        while engine.step() or engine.engine.scheduler.requests:
            steps += 1
    assert [told(engine.answers[name]) for name in "ab"] == expected
    settle(engine)
    drafted, accepted = counts(engine)
    assert accepted > 0.9 * drafted
    assert steps < 120 / 4


def test_blocks_of_accepted_tokens_are_found_again(build: Any, generate: Any) -> None:
    engine = build()
    first = generate("a", repetitive(40), 60)
    (plain,) = build().generate(first)
    (answer,) = engine.generate(with_speculation(first, ALWAYS["prompt_lookup"]))
    assert answer.tokens() == plain.tokens()
    again = generate("b", [*first.prompt_token_ids, *answer.tokens()[:50]], 10)
    (found,) = engine.generate(again)
    assert found.started is not None and found.started.cached_tokens >= 80
    assert found.tokens() == plain.tokens()[50:]


@pytest.mark.parametrize("proposer", ["prompt_lookup", "draft_model"])
def test_ends_within_a_draft(drafting: Any, decoder: Decoder, generate: Any, proposer: str) -> None:
    """A stop token, a length, and an abort; nothing behind the end is told."""
    engine = drafting(decoder)
    request = generate("r", repetitive(30), 40)
    tokens = engine.generate(request)[0].tokens()
    stop = tokens[17]
    cases = [
        generate("stop", repetitive(30), 40, stop=(stop,)),
        generate("length", repetitive(30), 11),
        generate("context", repetitive(30), 270),
    ]
    expected = [told(answer) for answer in engine.generate(*cases)]
    again = [with_speculation(each, ALWAYS[proposer]) for each in cases]
    assert [told(answer) for answer in engine.generate(*again)] == expected
    engine.send(with_speculation(generate("gone", repetitive(30), 200), ALWAYS[proposer]))
    for _ in range(6):
        engine.step()
    engine.run(Abort("gone"))
    assert engine.answers["gone"].completions[0].finish is FinishReason.ABORTED


def test_a_draft_model_that_fails_costs_the_draft(
    drafting: Any, decoder: Decoder, generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = drafting(decoder)
    request = generate("r", repetitive(30), 20)
    expected = told(engine.generate(request)[0])

    def broken(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(engine.engine.drafter.model.runner, "forward", broken)
    assert told(engine.generate(with_speculation(request, ALWAYS["draft_model"]))[0]) == expected
    settle(engine)
    assert counts(engine) == (0, 0)


def test_a_draft_that_cannot_be_decided_is_dropped(build: Any, generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's own token is decided all the same, and so are its neighbours' tokens."""
    engine = build()
    requests = requests_of_all_kinds(generate)[:3]
    expected = [told(answer) for answer in engine.generate(*requests)]
    sampling = engine.engine.drafter._strategy.inner
    decide = sampling.decide

    def picky(rows: Any, *rest: Any) -> Any:
        if any(row.key < 0 and len(row.output_token_ids) == 12 for row in rows):
            raise InvalidField("nothing is left", field="none")
        return decide(rows, *rest)

    monkeypatch.setattr(sampling, "decide", picky)
    again = [with_speculation(each, ALWAYS["prompt_lookup"]) for each in requests]
    assert [told(answer) for answer in engine.generate(*again)] == expected


def test_where_nothing_is_right_it_is_soon_left_alone(drafting: Any, smaller: Decoder, generate: Any) -> None:
    engine = drafting(smaller)
    wanted = Speculation("draft_model", 6)
    engine.generate(with_speculation(generate("r", repetitive(30), 200, temperature=1.5), wanted))
    settle(engine)
    drafted, _ = counts(engine)
    assert 0 < drafted < 120


def test_what_is_not_served_gets_no_draft(build: Any, generate: Any) -> None:
    cases = [
        generate("beam", repetitive(30), 20, search=BeamSearch(2)),
        generate("mirostat", repetitive(30), 20, shaping={"mirostat": Mirostat()}, seed=3, temperature=1.0),
    ]
    engine = build()
    expected = [told(answer) for answer in engine.generate(*cases)]
    again = [with_speculation(each, ALWAYS["prompt_lookup"]) for each in cases]
    assert [told(answer) for answer in engine.generate(*again)] == expected
    settle(engine)
    assert counts(engine) == (0, 0)
    draftless = with_speculation(generate("r", repetitive(30), 20), ALWAYS["draft_model"])
    assert told(engine.generate(draftless)[0]) == told(engine.generate(generate("s", repetitive(30), 20))[0])


def test_another_vocabulary_is_refused(decoder: Decoder, small_folder: Path) -> None:
    with torch.inference_mode():
        other = load_model(str(small_folder))
    with pytest.raises(InvalidField, match="67 tokens, the model 131"):
        LocalEngine(decoder, EngineConfig(), draft=other)
