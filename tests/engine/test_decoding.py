"""Every cut and processor in the engine: the same tokens alone, in a batch of 32, after preemption and at n > 1."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest

from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import Dry, Generate, Mirostat

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "no_repeat_ngram_size": 2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"typical_p": 0.8},
    {"epsilon_cutoff": 0.004, "dry": Dry(1.0, allowed_length=1, sequence_breakers=(5,))},
    {"eta_cutoff": 0.01, "bad_words": ((7,), (9, 11), (12, 13, 14))},
    {"top_n_sigma": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"mirostat": Mirostat(3.0, 0.3)},
    {"allowed_token_ids": (3, 5, 7, 11, 13, 17, 19), "no_repeat_ngram_size": 3},
    {"mirostat": Mirostat(4.0, 0.5), "frequency_penalty": 0.6, "logit_bias": {8: 2.0}},
]


def requests_of(generate: Any, count: int, new: int = 12) -> list[Generate]:
    """Of every kind, and every third of several sequences, where they are not greedy."""
    found = []
    for number in range(count):
        kind = {"temperature": 1.1, **KINDS[number % len(KINDS)]}
        prompt = random.Random(number).choices(range(2, 40), k=5 + 3 * number % 40)
        n = 1 + 2 * (number % 3 == 2) if kind["temperature"] else 1
        request = generate(str(number), prompt, new, n=n, seed=number)
        sampling = msgspec.structs.replace(request.sampling, **kind)
        found.append(msgspec.structs.replace(request, sampling=sampling))
    return found


def tokens_of(engine: LocalEngine, requests: list[Generate]) -> list[list[list[int]]]:
    answers = engine.generate(*requests)
    assert not [answer.error for answer in answers if answer.error]
    return [[a.tokens(i) for i in range(r.sampling.n)] for a, r in zip(answers, requests, strict=True)]


def test_alone_and_in_a_batch_of_32(build: Any, generate: Any) -> None:
    requests = requests_of(generate, 22)
    assert sum(request.sampling.n for request in requests) >= 32
    together = tokens_of(build(blocks=400, max_running=40), requests)
    solo = build(blocks=400, max_running=40)
    assert [tokens_of(solo, [request])[0] for request in requests] == together
    for several in together:
        assert len({tuple(tokens) for tokens in several}) == len(several)
    for request, several in zip(requests, together, strict=True):
        if request.sampling.allowed_token_ids:
            assert set().union(*several) <= set(request.sampling.allowed_token_ids)
        assert not request.sampling.bad_words or not set().union(*several) & {7}


def test_preemption_changes_no_token(build: Any, generate: Any) -> None:
    requests = requests_of(generate, 10, new=24)
    roomy, tight = build(blocks=200), build(blocks=9)
    wanted = tokens_of(roomy, requests)
    assert tokens_of(tight, requests) == wanted
    assert tight.engine.scheduler.preemptions >= 3 > roomy.engine.scheduler.preemptions == 0


@pytest.mark.parametrize("prompt_too", [False, True])
def test_entropies_come_with_the_log_probabilities(build: Any, generate: Any, prompt_too: bool) -> None:
    start = {"prompt_logprobs_from": 1} if prompt_too else {}
    asking = generate("a", [3, 4, 5, 6], 4, logprobs=131, entropy=True, **start)
    silent = generate("b", [3, 4, 5, 6], 4, logprobs=131, **start)
    answers = build().generate(asking, silent)
    for entry in [*answers[0].completions[0].logprobs, *(answers[0].prompt_logprobs or ())]:
        assert len(entry.top) == 131
        wanted = -sum(math.exp(each.logprob) * each.logprob for each in entry.top)
        assert entry.entropy == pytest.approx(wanted, abs=1e-4)
    assert all(entry.entropy is None for entry in answers[1].completions[0].logprobs)
    assert bool(answers[0].prompt_logprobs) == prompt_too
