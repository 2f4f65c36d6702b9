"""Activated LoRA in the engine: PEFT's generate over the same dequantized base is the oracle, and an empty cache."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_oracle import asked, logprobs_of, rounded_base

from lorry.adapters.activation import activation
from lorry.kernels.lora import SITES
from lorry.server.engine.graphs import Bucket
from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.engine.messages import Generate
from lorry.server.errors import InvalidField

INVOKED = {"active": (5, 9, 5), "other": (7,), "beyond": (9, 131), "plain": None}  # no id is 131
CASES = {  # length of a prompt, where the tokens begin that invoke "active"
    "at the first token": (20, (0,)),
    "before a block": (40, (15,)),
    "with a block": (40, (16,)),
    "in a block": (40, (17,)),
    "before the second block": (50, (31,)),
    "with the second block": (50, (32,)),
    "in the second block": (50, (33,)),
    "with the last token": (35, (32,)),
    "with the last token of a block": (32, (29,)),
    "several": (60, (3, 20, 41)),
    "overlapping": (30, (4, 6)),
    "not at all": (45, ()),
}


def prompt(length: int, starts: tuple[int, ...] = (), seed: int = 0, invoked: tuple[int, ...] = (5, 9, 5)) -> list[int]:
    """Random tokens; those that invoke an adapter only where they are said to be."""
    tokens = random.Random(seed * 1000 + length).choices(range(20, 131), k=length)
    for start in starts:
        tokens[start : start + len(invoked)] = invoked
    return tokens


@pytest.fixture(scope="module")
def peft(model_folder: Path) -> PeftModel:
    """The tiny Llama with its linears rounded to NF4 and the adapters of INVOKED, which change its tokens."""
    model, found = rounded_base(model_folder), None
    for rank, (name, tokens) in enumerate(INVOKED.items(), 5):
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(SITES) if rank % 2 else ["q_proj", "v_proj", "down_proj"],
            use_rslora=name == "other",
            alora_invocation_tokens=None if tokens is None else list(tokens),
            task_type="CAUSAL_LM",
        )
        if found is None:
            found = get_peft_model(model, config, adapter_name=name)
        else:
            found.add_adapter(name, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    found.eval()
    return found


@pytest.fixture(scope="module")
def folder(peft: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PEFT saves them."""
    saved = tmp_path_factory.mktemp("saved")
    peft.save_pretrained(str(saved))
    return saved


def cached(answer: Answer) -> int:
    assert answer.error is None, answer.error
    assert answer.started is not None
    return answer.started.cached_tokens


@pytest.mark.parametrize("budget", [19, 700])
def test_a_mixed_batch_equals_peft(build: Any, generate: Any, peft: PeftModel, folder: Path, budget: int) -> None:
    wishes: list[tuple[list[int], dict[str, float]]] = [
        (prompt(length, starts, number), {"active": 1.0}) for number, (length, starts) in enumerate(CASES.values())
    ]
    wishes += [
        (prompt(40, (17,)), {"plain": 1.0}),
        (prompt(40, (17,)), {}),
        (prompt(40, (17,)), {"active": -0.5}),
        (prompt(40, (17,), invoked=(7,)), {"other": 1.0}),
        (prompt(40, (16, 39), invoked=(7,)), {"other": 0.75}),
        (prompt(40, (17,), invoked=(9, 130)), {"beyond": 1.0}),
        (prompt(33, (32,), invoked=(7,)), {"other": 1.0}),
    ]
    requests = [
        generate(str(number), tokens, 4, adapters=adapters, logprobs=0, prompt_logprobs_from=1)
        for number, (tokens, adapters) in enumerate(wishes)
    ]
    engine: LocalEngine = build(adapters_dir=str(folder), token_budget=budget, max_running=20)
    answers = engine.generate(*requests)
    changed = 0
    for (tokens, adapters), answer in zip(wishes, answers, strict=True):
        chosen, logprobs = asked(peft, tuple(tokens), tuple(adapters.items()))
        assert answer.tokens() == chosen
        torch.testing.assert_close(logprobs_of(answer), logprobs, rtol=1e-3, atol=1e-3)
        changed += logprobs[-4:] != asked(peft, tuple(tokens), ())[1][-4:]
    assert changed == len(wishes) - 3, "the base, what is not invoked and what cannot be alone do not change"


def test_what_the_answer_holds_invokes_nothing(build: Any, generate: Any, peft: PeftModel, folder: Path) -> None:
    """PEFT's generate looks at the prompt alone, and so does what scores a continuation."""
    tokens = prompt(37, (17,), invoked=(7,))
    engine: LocalEngine = build(adapters_dir=str(folder))
    ids = torch.tensor([[*tokens, 30, 7, 40, 50]])
    request = generate("s", ids[0].tolist(), 0, adapters={"other": 1.0}, prompt_logprobs_from=37, logprobs=0)
    scored = engine.generate(Generate(**as_dict(request) | {"prompt_end": 37}))[0]
    whole = engine.generate(request)[0]
    peft.set_adapter("other")
    with torch.no_grad():
        for answer, offset in ((scored, 41 - 17), (whole, 41 - 38)):
            logits = peft(input_ids=ids, alora_offsets=[offset]).logits[0]
            expected = logits[36:40].log_softmax(-1).gather(1, ids[0, 37:, None])[:, 0].tolist()
            assert answer.prompt_logprobs is not None
            torch.testing.assert_close(
                [each.logprob for each in answer.prompt_logprobs], expected, rtol=1e-3, atol=1e-3
            )


def as_dict(request: Generate) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


@pytest.fixture
def alone(build: Any, generate: Any, folder: Path) -> Iterator[Any]:
    """alone(tokens, adapters, new): the greedy answer of another engine that has nothing of it in its cache."""
    engine: LocalEngine = build(adapters_dir=str(folder), max_running=1)
    salts = itertools.count()

    def answer(tokens: list[int], adapters: dict[str, float], new: int) -> list[int]:
        request = generate("alone", tokens, new, adapters=adapters, cache_salt=f"{next(salts)}")
        found = engine.generate(request)[0]
        assert cached(found) == 0
        return found.tokens()

    return answer


def test_what_stands_before_the_start_is_shared_with_the_base(
    build: Any, generate: Any, folder: Path, alone: Any
) -> None:
    engine: LocalEngine = build(adapters_dir=str(folder))
    for start in (0, 15, 16, 17, 32, 57):
        tokens, shared = prompt(60, (start,)), start // 16 * 16
        expected = {name: alone(tokens, {name: 1.0} if name else {}, 5) for name in ("", "active", "plain")}
        for order in (("", "active", "plain"), ("active", "", "plain")):
            for times in range(2):
                for name, found in zip(order, (0, shared, 0), strict=True):
                    adapters, salt = {name: 1.0} if name else {}, f"{start} {order[0]}"
                    answer = engine.generate(generate("r", tokens, 5, adapters=adapters, cache_salt=salt))[0]
                    assert (cached(answer), answer.tokens()) == (48 if times else found, expected[name]), salt


def test_adapters_share_a_context_and_a_conversation_goes_on(
    build: Any, generate: Any, folder: Path, alone: Any
) -> None:
    context = prompt(60)
    engine: LocalEngine = build(adapters_dir=str(folder))

    def ask(name: str, tokens: list[int], salt: str = "") -> tuple[int, list[int]]:
        adapters = {name: 1.0} if name else {}
        answer = engine.generate(generate("r", tokens, 9, adapters=adapters, cache_salt=salt))[0]
        assert answer.tokens() == alone(tokens, adapters, 9)
        return cached(answer), answer.tokens()

    assert ask("active", [*context, 5, 9, 5])[0] == 0
    assert ask("other", [*context, 7])[0] == 48
    assert ask("other", [*context, 5, 9, 5])[0] == 48, "not invoked: the base to its end"
    assert ask("", [*context, 5, 9, 5])[0] == 48, "the last token of the fourth block was not in the prompt"
    found, answer = ask("active", [*context, 5, 9, 5])
    assert found == 48
    assert ask("", [*context, 5, 9, 5, *answer[:5]])[0] == 48, "an answer of the adapter is not the base's"
    assert ask("active", [*context, 5, 9, 5, *answer, 5, 9, 5])[0] == 64, "the base has it"
    assert ask("active", [*context, 5, 9, 5], "salt")[0] == 0
    assert ask("other", [*context, 7], "salt")[0] == 48


def test_the_same_block_under_two_starts(build: Any, generate: Any, folder: Path, alone: Any) -> None:
    """What follows a block decides which match in it was the last."""
    short = [*prompt(18), 5, 9, 5, *prompt(9, seed=1), 5, 9, 30, 31, 32]
    long = [*short[:32], 5, 31, 32]
    assert (activation(short, (5, 9, 5)), activation(long, (5, 9, 5))) == (18, 30) and short[:32] == long[:32]
    engine: LocalEngine = build(adapters_dir=str(folder))
    for tokens, found in ((short, 0), (long, 16), (short, 32), (long, 32)):
        answer = engine.generate(generate("r", tokens, 7, adapters={"active": 1.0}))[0]
        assert (cached(answer), answer.tokens()) == (found, alone(tokens, {"active": 1.0}, 7))


def requests_of_all_kinds(generate: Any) -> list[Generate]:
    names = ["active", "other", "plain", "", "active", "beyond"]
    return [
        generate(
            str(number),
            prompt(30 + 3 * number, (number * 4,), number, (7,) if names[number % 6] == "other" else (5, 9, 5)),
            12,
            adapters={names[number % 6]: 1.0} if names[number % 6] else {},
            n=1 + number % 3,
            temperature=0.8 * (number % 2),
            seed=number,
            priority=number % 2,
        )
        for number in range(6)
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_forks_and_graphs_change_no_token(build: Any, generate: Any, folder: Path, ahead: bool) -> None:
    requests = requests_of_all_kinds(generate)
    roomy: LocalEngine = build(adapters_dir=str(folder), max_running=1 + 2)
    expected = [roomy.generate(request)[0] for request in requests]
    tight: LocalEngine = build(adapters_dir=str(folder), blocks=7, token_budget=24, max_running=6, ahead=ahead)
    if ahead:
        with torch.inference_mode():
            assert list(tight.engine.runner.record([Bucket(6, 19, 0), Bucket(6, 19, 4)]))
    answers = tight.generate(*requests)
    assert roomy.engine.scheduler.preemptions == 0 and tight.engine.scheduler.preemptions >= 3
    for request, answer, other in zip(requests, answers, expected, strict=True):
        assert answer.error is None
        for index in range(request.sampling.n):
            assert answer.tokens(index) == other.tokens(index), request.request_id


def test_a_mix_is_refused_by_name(build: Any, generate: Any, folder: Path) -> None:
    engine: LocalEngine = build(adapters_dir=str(folder))
    mix = {"plain": 0.5, "active": 0.5}
    before, good = engine.generate(generate("b", prompt(9), adapters=mix), generate("g", prompt(9)))
    engine.generate(generate("load", prompt(9), 1, adapters={"active": 1.0}))
    after = engine.generate(generate("a", prompt(9), adapters=mix))[0]
    for answer in (before, after):
        assert isinstance(answer.error, InvalidField) and answer.error.fields == {"field": "adapters"}
        assert "active is an activated LoRA" in answer.error.message and not answer.completions
    assert len(good.tokens()) == 12
