"""Adapters of the embedding, the head and whole modules in the engine, against PEFT over the same dequantized base."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_oracle import asked, logprobs_of, rounded_base

from lorry.server.engine.local import LocalEngine

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "head": {"target_modules": ["lm_head"], "use_rslora": True},
    "dora": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "use_dora": True},
    "own": {"target_modules": ["down_proj"], "modules_to_save": ["embed_tokens", "lm_head", "k_proj"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [30, 50], "lm_head": [7]}},
    "invoked": {"target_modules": ["lm_head", "q_proj"], "alora_invocation_tokens": [7]},
}


def prompt(length: int) -> list[int]:
    tokens = random.Random(length).choices(range(20, 131), k=length)
    tokens[0], tokens[length // 2] = 30, 7
    return tokens


@pytest.fixture(scope="module")
def pefts(model_folder: Path) -> dict[str, PeftModel]:
    base, found = rounded_base(model_folder), {}
    for name, config in ADAPTERS.items():
        found[name] = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=5, task_type="CAUSAL_LM", **config), adapter_name=name
        )
        torch.manual_seed(3)
        for key, parameter in found[name].named_parameters():
            if parameter.requires_grad and "magnitude" not in key:
                parameter.data.normal_(0, 0.2 if "lora_" in key else 0.7 * float(parameter.data.std()))
        found[name].eval()
    return found


@pytest.fixture(scope="module")
def folder(pefts: dict[str, PeftModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PEFT saves them."""
    saved = tmp_path_factory.mktemp("saved")
    for peft in pefts.values():
        peft.save_pretrained(str(saved))
    return saved


@pytest.mark.parametrize(("budget", "ahead"), [(19, False), (700, False), (700, True)])
def test_a_mixed_batch_equals_peft(
    build: Any, generate: Any, pefts: dict[str, PeftModel], folder: Path, budget: int, ahead: bool
) -> None:
    wishes = [(prompt(length), name) for length in (23, 48) for name in ("", *ADAPTERS)]
    requests = [
        generate(str(number), tokens, 4, adapters={name: 1.0} if name else {}, logprobs=0, prompt_logprobs_from=1)
        for number, (tokens, name) in enumerate(wishes)
    ]
    engine: LocalEngine = build(adapters_dir=str(folder), token_budget=budget, max_running=20, ahead=ahead)
    answers = engine.generate(*requests)
    for (tokens, name), answer in zip(wishes, answers, strict=True):
        assert answer.error is None, answer.error
        chosen, logprobs = asked(pefts[name or "plain"], tuple(tokens), ((name, 1.0),) if name else ())
        assert answer.tokens() == chosen, name
        torch.testing.assert_close(logprobs_of(answer), logprobs, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: n + m)
        if name:
            assert logprobs != asked(pefts["plain"], tuple(tokens), ())[1]


def test_a_fork_and_a_row_decided_alone_keep_their_head(build: Any, generate: Any, folder: Path) -> None:
    engine: LocalEngine = build(adapters_dir=str(folder))
    options = {"adapters": {"own": 1.0}, "temperature": 0.8, "seed": 5, "n": 3}
    together = engine.generate(generate("a", prompt(30), 6, **options), generate("b", prompt(23), 6))[0]
    decide, calls = engine.engine.committer.strategy.decide, []

    def failing(rows: Any, *rest: Any) -> Any:
        calls.append(len(rows))
        if len(rows) > 1:
            raise RuntimeError("not together")
        return decide(rows, *rest)

    engine.engine.committer.strategy.decide = failing  # type: ignore[method-assign]
    alone = engine.generate(generate("a", prompt(30), 6, **options), generate("b", prompt(23), 6))[0]
    tokens = [[answer.tokens(index) for index in range(3)] for answer in (alone, together)]
    assert max(calls) > 1 and tokens[0] == tokens[1]
