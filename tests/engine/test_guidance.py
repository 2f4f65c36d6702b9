"""Guidance through the engine: transformers' generate and PEFT over the same base are the oracles."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.engine.messages import Abort, FinishReason, Tokens
from lorry.server.errors import PromptTooLong
from lorry.server.params import BeamSearch, Guidance


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(2, 131), k=length)


def chosen(answer: Answer) -> tuple[list[int], list[float]]:
    assert answer.error is None, answer.error
    (completion,) = answer.completions.values()
    return completion.token_ids, [each.logprob for each in completion.logprobs]


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, 2.5])
def test_a_negative_prompt_equals_transformers(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, scale: float
) -> None:
    own, negative = prompt(21), prompt(37, 1)
    theirs = dequantized.generate(
        torch.tensor([own]),
        do_sample=False,
        max_new_tokens=16,
        min_new_tokens=16,
        guidance_scale=scale,
        negative_prompt_ids=torch.tensor([negative]),
        pad_token_id=0,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = theirs.sequences[0, len(own) :].tolist()
    scores = torch.cat(theirs.scores).log_softmax(1).gather(1, torch.tensor(expected)[:, None])[:, 0]
    request = generate("g", own, 16, search=Guidance(scale, tuple(negative)), logprobs=0)
    tokens, logprobs = chosen(build().generate(request)[0])
    assert tokens == expected
    assert logprobs == pytest.approx(scores.tolist(), abs=1e-3)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_base_as_the_negative_equals_peft(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, adapters_dir: Path, scale: float
) -> None:
    peft = PeftModel.from_pretrained(copy.deepcopy(dequantized), str(adapters_dir / "c")).eval()
    text, expected, scores = prompt(30), list[int](), list[float]()
    with torch.no_grad():
        for _ in range(12):
            ids = torch.tensor([text + expected])
            towards = peft(input_ids=ids).logits[0, -1].log_softmax(0)
            with peft.disable_adapter():
                away = peft(input_ids=ids).logits[0, -1].log_softmax(0)
            mixed = (away + scale * (towards - away)).log_softmax(0)
            expected.append(int(mixed.argmax()))
            scores.append(float(mixed.max()))
    request = generate("g", text, 12, adapters={"c": 1.0}, search=Guidance(scale), logprobs=0)
    tokens, logprobs = chosen(build().generate(request)[0])
    assert tokens == expected
    assert logprobs == pytest.approx(scores, abs=2e-3)


def cases(generate: Any) -> list[Any]:
    drawn = {"temperature": 0.8, "shaping": {"top_p": 0.9, "repetition_penalty": 1.2}}
    return [
        generate("base", prompt(40), 30, adapters={"a": 1.0}, search=Guidance(2.0)),
        generate("mix", prompt(17, 1), 30, adapters={"a": 0.5, "e": -0.5}, search=Guidance(1.5), seed=3, **drawn),
        generate("prompt", prompt(33, 2), 30, search=Guidance(1.5, tuple(prompt(70, 3))), seed=4, **drawn),
        generate("both", prompt(33, 4), 30, adapters={"c": 1.0}, search=Guidance(0.4, tuple(prompt(5, 3)))),
        generate("plain", prompt(40), 30, seed=5, n=2, **drawn),
        generate("adapted", prompt(40), 30, adapters={"a": 1.0}),
        generate("beams", prompt(25, 5), 10, search=BeamSearch(3)),
        generate("scored", prompt(20, 6), 8, adapters={"b": 1.0}, search=Guidance(2.0), prompt_logprobs_from=1),
    ]


def told(answer: Answer) -> dict[int, list[int]]:
    assert answer.error is None, answer.error
    return {index: each.token_ids for index, each in answer.completions.items()}


@pytest.mark.parametrize("settings", [{}, {"blocks": 26}, {"token_budget": 19}, {"ahead": True}])
def test_a_mixed_batch_gives_each_what_it_gets_alone(build: Any, generate: Any, settings: dict[str, Any]) -> None:
    alone = [told(build().generate(request)[0]) for request in cases(generate)]
    engine = build(**settings)
    engine.generate(*(generate(f"load {name}", [5], 1, adapters={name: 1.0}) for name in "abce"))
    together = engine.generate(*cases(generate))
    assert [told(answer) for answer in together] == alone
    assert together[-1].prompt_logprobs is not None and len(together[-1].prompt_logprobs) == 19
    assert all(len(answer.completions) == (2 if place == 4 else 1) for place, answer in enumerate(together))
    if "blocks" in settings:
        assert engine.engine.scheduler.preemptions > 0


def test_a_scale_of_1_is_no_guidance_and_more_of_it_changes_the_answer(build: Any, generate: Any) -> None:
    engine = build()
    plain, same, more = engine.generate(
        generate("p", prompt(30), 20, adapters={"b": 1.0}),
        generate("s", prompt(30), 20, adapters={"b": 1.0}, search=Guidance(1.0)),
        generate("m", prompt(30), 20, adapters={"b": 1.0}, search=Guidance(8.0)),
    )
    assert told(plain) == told(same) != told(more)


def test_tokens_are_streamed_and_the_shadow_is_never_told(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    engine.generate(generate("g", prompt(30), 10, adapters={"b": 1.0}, search=Guidance(2.0)))
    messages = [message for message in engine.messages if isinstance(message, Tokens)]
    assert [len(message.token_ids) for message in messages] == [1] * 10
    assert {message.index for message in messages} == {0}
    assert [message.finish for message in messages] == [None] * 9 + [FinishReason.LENGTH]


def test_the_shadow_finds_what_the_base_has_computed(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    engine.generate(generate("base", prompt(70), 1))
    engine.send(generate("g", prompt(70), 20, adapters={"b": 1.0}, search=Guidance(2.0)))
    while len(engine.engine.scheduler.running) < 2 and (engine.step() or engine.engine.scheduler.requests):
        pass
    own, shadow = engine.engine.scheduler.requests["g"].sequences
    assert shadow.shadowy and not own.shadowy
    assert shadow.registered >= 4 and not set(shadow.table.blocks) & set(own.table.blocks)
    engine.run()


def test_ends(build: Any, generate: Any) -> None:
    """A stop token, an abort, and a time limit end both; what was there is the answer."""
    engine: LocalEngine = build()
    search = Guidance(2.0, tuple(prompt(50, 1)))
    tokens = told(engine.generate(generate("whole", prompt(30), 30, search=search))[0])[0]
    (stopped,) = engine.generate(generate("stop", prompt(30), 30, search=search, stop=(tokens[9],)))
    place = tokens.index(tokens[9])
    assert told(stopped) == {0: tokens[: place + 1]}
    assert stopped.completions[0].finish is FinishReason.STOP
    engine.send(generate("gone", prompt(30), 100, search=search))
    for _ in range(8):
        engine.step()
    engine.run(Abort("gone"))
    gone = engine.answers["gone"].completions
    assert gone[0].finish is FinishReason.ABORTED and 0 < len(gone[0].token_ids) < 100
    (late,) = engine.generate(generate("late", prompt(30), 200, search=search, time_limit=1e-6))
    assert [each.finish for each in late.completions.values()] == [FinishReason.TIME_LIMIT]


def test_a_negative_prompt_has_to_fit(build: Any, generate: Any) -> None:
    (answer,) = build().generate(generate("g", prompt(20), 50, search=Guidance(2.0, tuple(prompt(280, 1)))))
    assert isinstance(answer.error, PromptTooLong)


def test_a_fault_of_one_pair_is_its_own(build: Any, generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that cannot be decided as a whole is decided pair by pair, though their rows stand apart."""
    requests = cases(generate)[:4]
    alone = [told(build().generate(request)[0]) for request in requests]
    engine: LocalEngine = build()
    sampling = engine.engine.drafter._strategy.inner.sampling  # type: ignore[union-attr, attr-defined]
    decide = sampling.decide

    def picky(rows: Any, *rest: Any) -> Any:
        if len(rows) > 1:
            raise RuntimeError("too many")
        return decide(rows, *rest)

    monkeypatch.setattr(sampling, "decide", picky)
    assert [told(answer) for answer in engine.generate(*requests)] == alone
