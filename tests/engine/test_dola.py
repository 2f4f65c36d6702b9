"""DoLa: the paper's equations, one after the other, over the hidden states of transformers and PEFT are the oracle."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.kernels import native
from lorry.server.config import MIB, EngineConfig
from lorry.server.decoding.dola import OUTSIDE, contrasted
from lorry.server.engine.build import Types
from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.model.load import load_model
from lorry.server.params import DoLa, Guidance, Speculation

Doubles = NDArray[np.float64]
ALL = (0, 1, 2)
BELOW = -OUTSIDE / 2  # scores of tokens outside of the head


def softmax(z: Doubles) -> Doubles:
    p = np.exp(z - z.max())
    return p / p.sum()


def relative_entropy(p: Doubles, m: Doubles) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, m, strict=True) if a > 0))


def reference(own: Doubles, early: Doubles) -> tuple[Doubles, int]:
    """The scores of the paper, -inf outside of the head, and the layer that was taken; own [V], early [J, V]."""
    p, distances = softmax(own), []
    for z in early:
        q = softmax(z)
        middle = (p + q) / 2
        distances.append(relative_entropy(p, middle) / 2 + relative_entropy(q, middle) / 2)
    layer = int(np.argmax(distances))
    scores = np.full(len(p), -np.inf)
    head = p >= 0.1 * p.max()
    scores[head] = np.log(p[head]) - np.log(softmax(early[layer])[head])
    return scores, layer


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(2, 131), k=length)


def expected(
    model: Any, head: Any, text: list[int], layers: tuple[int, ...], new: int
) -> tuple[list[int], list[float]]:
    """A greedy answer and its log-probabilities."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(new):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([text + tokens]), output_hidden_states=True)
            early = torch.stack([head(output.hidden_states[layer][:, -1])[0] for layer in layers])
        scores, _ = reference(output.logits[0, -1].double().numpy(), early.double().numpy())
        tokens.append(int(scores.argmax()))
        logprobs.append(float(np.log(softmax(scores).max())))
    return tokens, logprobs


def dola(layers: tuple[int, ...] = ALL, **shaping: Any) -> dict[str, Any]:
    return {"dola": DoLa(layers), **shaping}


def told(answer: Answer) -> dict[int, list[int]]:
    assert answer.error is None, answer.error
    return {index: each.token_ids for index, each in answer.completions.items()}


def logprobs_of(answer: Answer) -> list[float]:
    return [each.logprob for each in answer.completions[0].logprobs]


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_rows_equal_the_paper(layers: int) -> None:
    generator = torch.Generator().manual_seed(layers)
    taken = set()
    for spread in (0.3, 1.0, 4.0, 20.0):
        own = spread * torch.randn(37, generator=generator)
        early = torch.randn(layers, 1, generator=generator).exp() * torch.randn(layers, 37, generator=generator)
        if spread == 1.0:
            own[5], early[0, 7] = -torch.inf, -torch.inf
            own[7] = own.max() - 20.0
        scores, layer = reference(own.double().numpy(), early.double().numpy())
        found = contrasted(own, early).double().numpy()
        head = np.isfinite(scores)
        assert found[head] == pytest.approx(scores[head], abs=1e-4)
        assert not np.isnan(found).any() and (found[~head] < BELOW).all()
        outside = own.double().numpy()[~head]
        assert (np.argsort(found[~head], kind="stable") == np.argsort(outside, kind="stable")).all() or spread == 20.0
        taken.add(layer)
    assert layers == 1 or len(taken) > 1


@pytest.mark.parametrize("layers", [(0,), (0, 2), (1, 2), ALL])
def test_greedy_equals_transformers_hidden_states(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, layers: tuple[int, ...]
) -> None:
    text = prompt(41)
    tokens, logprobs = expected(dequantized, dequantized.lm_head, text, layers, 14)
    engine: LocalEngine = build()
    found, plain = engine.generate(
        generate("d", text, 14, shaping=dola(layers), logprobs=0), generate("p", text, 14, logprobs=0)
    )
    assert told(found) == {0: tokens} != told(plain)
    assert logprobs_of(found) == pytest.approx(logprobs, abs=2e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_adapters_equal_peft(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, tmp_path: Path, config: dict[str, Any]
) -> None:
    """The head of early layers is the adapter's too."""
    lora = LoraConfig(r=5, task_type="CAUSAL_LM", **config)
    peft: PeftModel = get_peft_model(copy.deepcopy(dequantized), lora, adapter_name="own")
    torch.manual_seed(3)
    for key, parameter in peft.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2 if "lora_" in key else 0.7 * float(parameter.data.std()))
    peft.eval().save_pretrained(str(tmp_path))
    text = prompt(30)
    tokens, logprobs = expected(peft, peft.get_output_embeddings(), text, (0, 2), 10)
    engine: LocalEngine = build(adapters_dir=str(tmp_path))
    answer, other = engine.generate(
        generate("d", text, 10, adapters={"own": 1.0}, shaping=dola((0, 2)), logprobs=0),
        generate("o", text, 10, shaping=dola((1,))),
    )
    assert told(answer) == {0: tokens} != told(other)
    assert logprobs_of(answer) == pytest.approx(logprobs, abs=2e-3)


def cases(generate: Any) -> list[Any]:
    drawn = {"top_p": 0.9, "repetition_penalty": 1.2}
    return [
        generate("ahead", prompt(9) * 4, 20, shaping={"speculation": Speculation("prompt_lookup", adaptive=False)}),
        generate("greedy", prompt(40), 20, shaping=dola((0, 2))),
        generate("drawn", prompt(17, 1), 20, temperature=0.8, seed=3, shaping=dola((1,), **drawn)),
        generate("three", prompt(33, 2), 20, temperature=1.1, seed=4, n=3, shaping=dola(**drawn), logprobs=2),
        generate("adapted", prompt(33, 4), 20, adapters={"c": 1.0}, shaping=dola((2,))),
        generate("mixed", prompt(70, 5), 12, adapters={"a": 0.5, "e": -0.5}, temperature=0.7, shaping=dola()),
        generate("plain", prompt(40), 20, temperature=0.8, seed=5, n=2, shaping=drawn),
        generate("guided", prompt(25, 5), 20, search=Guidance(2.0, tuple(prompt(30, 6)))),
        generate("scored", prompt(20, 6), 8, adapters={"b": 1.0}, shaping=dola((0,)), prompt_logprobs_from=1),
    ]


def test_a_mixed_batch_gives_each_what_it_gets_alone(build: Any, generate: Any) -> None:
    single: LocalEngine = build()
    alone = [told(single.generate(request)[0]) for request in cases(generate)]
    for settings in ({}, {"blocks": 18}, {"token_budget": 19}, {"ahead": True}):
        engine: LocalEngine = build(**settings)
        engine.generate(*(generate(f"load {name}", [5], 1, adapters={name: 1.0}) for name in "abce"))
        together = engine.generate(*cases(generate))
        assert [told(answer) for answer in together] == alone, settings
        assert "blocks" not in settings or engine.engine.scheduler.preemptions > 0
    assert len(alone[3]) == 3 and len({tuple(tokens) for tokens in alone[3].values()}) == 3


def test_the_prompts_log_probabilities_are_the_models(build: Any, generate: Any) -> None:
    plain, contrast = build().generate(
        generate("p", prompt(30), 3, prompt_logprobs_from=1),
        generate("d", prompt(30), 3, shaping=dola(), prompt_logprobs_from=1),
    )
    assert plain.prompt_logprobs == contrast.prompt_logprobs and len(plain.prompt_logprobs) == 29


def test_where_nothing_of_the_head_is_left_the_model_says(build: Any, generate: Any, decoder: Any) -> None:
    """As with a grammar: all that is allowed is outside of the head, and the most likely of it is taken."""
    engine: LocalEngine = build()
    (rivals,) = engine.generate(generate("p", prompt(30), 1, logprobs=131))
    likely = [each.token_id for each in rivals.completions[0].logprobs[0].top]
    allowed = tuple(reversed(likely[100:120]))
    (answer,) = engine.generate(generate("d", prompt(30), 1, shaping=dola(allowed_token_ids=allowed), logprobs=0))
    assert told(answer) == {0: [likely[100]]}
    assert logprobs_of(answer)[0] < BELOW


@pytest.mark.parametrize("allowed", [(), tuple(range(3, 131, 17))], ids=["all", "few"])
@pytest.mark.parametrize("penalties", [(1.3, 0.0, 0.0), (0.8, 0.5, -0.3)], ids=str)
def test_penalties_act_on_the_contrast_and_outside_of_the_head_on_the_model(
    build: Any,
    generate: Any,
    dequantized: LlamaForCausalLM,
    allowed: tuple[int, ...],
    penalties: tuple[float, float, float],
) -> None:
    """Where few tokens are allowed, the head has one of them at times."""
    text, tokens, outside = prompt(9), [], 0
    repetition, presence, frequency = penalties
    lawful = np.isin(np.arange(131), allowed) if allowed else np.ones(131, bool)
    for _ in range(16):
        with torch.no_grad():
            output = dequantized(input_ids=torch.tensor([text + tokens]), output_hidden_states=True)
            early = torch.stack([dequantized.lm_head(output.hidden_states[layer][:, -1])[0] for layer in ALL])
        own = output.logits[0, -1].double().numpy()
        scores, _ = reference(own, early.double().numpy())
        if not np.isfinite(scores[lawful]).any():
            scores, outside = np.log(softmax(own)), outside + 1
        seen, counts = np.isin(np.arange(131), text + tokens), np.bincount(tokens, minlength=131)
        scores = np.where(seen, np.where(scores < 0, scores * repetition, scores / repetition), scores)
        scores -= presence * (counts > 0) + frequency * counts
        tokens.append(int(np.where(lawful, scores, -np.inf).argmax()))
    shaping = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    engine: LocalEngine = build()
    (answer,) = engine.generate(generate("d", text, 16, shaping=dola(allowed_token_ids=allowed, **shaping)))
    assert told(answer) == {0: tokens}
    assert 0 < outside < 16 if allowed else outside == 0


def test_top_n_sigma_measures_the_head(build: Any, generate: Any, dequantized: LlamaForCausalLM) -> None:
    """Not what is outside of it, far below: a cut of so much would be none."""
    kept: set[int] = set()
    cut = 0
    for seed in range(5):
        text = prompt(41, seed)
        with torch.no_grad():
            output = dequantized(input_ids=torch.tensor([text]), output_hidden_states=True)
            early = dequantized.lm_head(output.hidden_states[1][:, -1])
        scores, _ = reference(output.logits[0, -1].double().numpy(), early.double().numpy())
        head = np.flatnonzero(np.isfinite(scores))
        kept = set(head[scores[head] >= scores[head].max() - 0.5 * scores[head].std()].tolist())
        cut += len(head) - len(kept)
        drawn = generate("d", text, 1, temperature=5.0, seed=seed, n=16, shaping=dola((1,), top_n_sigma=0.5))
        (answer,) = build().generate(drawn)
        found = {tokens[0] for tokens in told(answer).values()}
        assert found <= kept and (len(kept) == 1 or len(found) > 1)
    assert cut > 5


def test_a_fault_of_one_row_is_its_own(build: Any, generate: Any) -> None:
    """A step that cannot be decided as a whole is decided row by row, from the same contrast."""
    requests = cases(generate)[:6]
    engine: LocalEngine = build()
    alone = [told(engine.generate(request)[0]) for request in requests]
    decide = engine.engine.committer.strategy.decide

    def picky(rows: Any, *rest: Any) -> Any:
        if len(rows) > 1:
            raise RuntimeError("too many")
        return decide(rows, *rest)

    engine.engine.committer.strategy.decide = picky  # type: ignore[method-assign]
    assert [told(answer) for answer in engine.generate(*requests)] == alone


@pytest.fixture
def fused(tmp_path: Path) -> Iterator[LocalEngine]:
    """An engine whose layers are one call of the CPU kernels, but where one of them is tapped."""
    shape = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=131, max_position_embeddings=90))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1.1 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        decoder = load_model(str(tmp_path))
    assert decoder._fused is not None
    config = EngineConfig(kv_dtype="float32", adapter_memory=MIB, kv_memory=4 * MIB, max_running=8)
    engine = LocalEngine(decoder, config, Types.choose(config))
    yield engine
    engine.close()


@pytest.mark.skipif(native.library() is None, reason="torch's own products depend on the batch")
def test_neighbours_keep_their_bits(fused: LocalEngine, generate: Any) -> None:
    text = prompt(50)
    (alone,) = fused.generate(generate("alone", text, 20, logprobs=0))
    beside, contrast = fused.generate(
        generate("beside", text, 20, logprobs=0), generate("d", text, 20, shaping=dola((0, 1)), logprobs=0)
    )
    assert told(beside) == told(alone) != told(contrast)
    assert logprobs_of(beside) == logprobs_of(alone)
