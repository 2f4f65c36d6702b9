"""Beam search in the engine: transformers' generate over the same base is the oracle; a plain reference, written from
the paper, for the diverse one, which transformers has no more."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.engine.messages import Abort, FinishReason, Generate, Tokens
from lorry.server.errors import DeadlineExceeded, InvalidField, OutOfMemory, PromptTooLong
from lorry.server.params import BeamSearch, ContrastiveSearch, EarlyStopping

THEIRS: dict[EarlyStopping, bool | str] = {
    EarlyStopping.HEURISTIC: False,
    EarlyStopping.FIRST: True,
    EarlyStopping.NEVER: "never",
}
Ranked = list[tuple[list[int], float]]


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(2, 131), k=length)


def ranked(answer: Answer) -> Ranked:
    assert answer.error is None, answer.error
    found = [answer.completions[index] for index in sorted(answer.completions)]
    assert all(each.finish is not None for each in found)
    return [(each.token_ids, each.score if each.score is not None else float("nan")) for each in found]


def expect_equal(ours: Ranked, theirs: Ranked) -> None:
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], rel=2e-5, abs=2e-5)


class Counting(LogitsProcessor):
    """Presence and frequency penalties, which transformers lacks."""

    def __init__(self, start: int, presence: float, frequency: float) -> None:
        self.start, self.presence, self.frequency = start, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)
        output = input_ids[:, self.start :]
        counts.scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


def theirs(
    model: LlamaForCausalLM, tokens: list[int], new: int, n: int, search: BeamSearch, eos: tuple[int, ...], **rest: Any
) -> Ranked:
    ids = torch.tensor([tokens])
    shaping = rest.get("shaping", {})
    bias = {(token_id,): float(value) for token_id, value in shaping.get("logit_bias", {}).items()}
    counting = Counting(len(tokens), shaping.get("presence_penalty", 0.0), shaping.get("frequency_penalty", 0.0))
    with torch.no_grad():
        answer: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=search.width,
            num_return_sequences=n,
            length_penalty=search.length_penalty,
            early_stopping=THEIRS[search.early_stopping],
            max_new_tokens=new,
            min_new_tokens=rest.get("min_new", 0) or None,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            do_sample=False,
            repetition_penalty=shaping.get("repetition_penalty", 1.0),
            sequence_bias=bias or None,
            logits_processor=LogitsProcessorList([counting]),
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = []
    for row, score in zip(answer.sequences[:, len(tokens) :].tolist(), answer.sequences_scores.tolist(), strict=True):
        end = next((place + 1 for place, token_id in enumerate(row) if token_id in eos), len(row))
        found.append((row[:end], score))
    return found


def ours(engine: LocalEngine, request: Generate, eos: tuple[int, ...]) -> Ranked:
    engine.engine.committer.eos_token_ids = eos
    return ranked(engine.generate(request)[0])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_answers_and_scores_are_those_of_transformers(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, data: st.DataObject
) -> None:
    draw = data.draw
    width = draw(st.integers(2, 7))
    search = BeamSearch(
        width,
        draw(st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0])),
        draw(st.sampled_from(EarlyStopping)),
    )
    n = draw(st.integers(1, width))
    new = draw(st.integers(1, 13))
    eos = tuple(draw(st.sets(st.integers(1, 130), max_size=3)))
    shaping: dict[str, Any] = {
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.3])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.0, 0.4])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.0, -0.2])),
        "logit_bias": {token_id: draw(st.sampled_from([-1.0, 1.0, 2.5, 4.0])) for token_id in eos},
    }
    rest = {"min_new": draw(st.integers(0, min(4, new))), "shaping": shaping}
    tokens = prompt(draw(st.sampled_from([1, 14, 16, 19])), draw(st.integers(0, 9)))
    request = generate("r", tokens, new, n=n, search=search, ignore_eos=False, **rest)
    engine = shared(build)
    expect_equal(ours(engine, request, eos), theirs(dequantized, tokens, new, n, search, eos, **rest))
    assert engine.engine.scheduler.allocator.used == 0


def shared(build: Any) -> LocalEngine:
    """One engine for all examples of a test."""
    if not hasattr(build, "engine"):
        build.engine = build(max_running=32)
    engine: LocalEngine = build.engine
    return engine


# ---------------------------------------------------------------- diverse beam search


def diverse(
    model: LlamaForCausalLM, tokens: list[int], new: int, n: int, search: BeamSearch, eos: tuple[int, ...]
) -> Ranked:
    """Algorithm 1 of Vijayakumar et al. 2016 with the Hamming diversity: whole texts, each run anew in each step."""
    width, alpha = search.width // search.groups, search.length_penalty
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(search.groups)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(search.groups)]
    for t in range(1, new + 1):
        taken = torch.zeros(131)
        for g in range(search.groups):
            if not beams[g]:
                continue
            with torch.no_grad():
                logits = model(torch.tensor([tokens + y for _, y in beams[g]])).logits[:, -1]
            theta = logits.log_softmax(-1) - search.diversity_penalty * taken
            every = [(s + float(theta[b, v]), [*y, v]) for b, (s, y) in enumerate(beams[g]) for v in range(131)]
            every.sort(key=lambda each: -each[0])
            every = every[: width * max(2, 1 + len(eos))]
            ends = [t == new or y[-1] in eos for _, y in every]
            done = [(s, y) for rank, (s, y) in enumerate(every) if ends[rank] and rank < width]
            beams[g] = [each for each, end in zip(every, ends, strict=True) if not end][:width]
            for _, y in done + beams[g]:
                taken[y[-1]] += 1
            finished[g] = sorted(finished[g] + [(s / t**alpha, y) for s, y in done], key=lambda each: -each[0])[:width]
            if len(finished[g]) == width and beams[g]:
                length = new if search.early_stopping is EarlyStopping.NEVER and alpha > 0 else t
                best = beams[g][0][0] / length**alpha
                if search.early_stopping is EarlyStopping.FIRST or best <= finished[g][-1][0]:
                    beams[g] = []
    best_of_all = sorted((each for group in finished for each in group), key=lambda each: -each[0])[:n]
    return [(y, score) for score, y in best_of_all]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_diverse_groups_are_those_of_the_paper(
    build: Any, generate: Any, dequantized: LlamaForCausalLM, data: st.DataObject
) -> None:
    draw = data.draw
    width, groups = draw(st.sampled_from([(2, 2), (3, 3), (4, 2), (6, 2), (6, 3), (5, 5)]))
    search = BeamSearch(
        width,
        draw(st.sampled_from([0.0, 1.0, 1.5])),
        draw(st.sampled_from(EarlyStopping)),
        groups,
        draw(st.sampled_from([0.5, 1.0, 3.0])),
    )
    n, new = draw(st.integers(1, width)), draw(st.integers(1, 9))
    eos = tuple(draw(st.sets(st.integers(1, 130), max_size=2)))
    tokens = prompt(draw(st.sampled_from([3, 16])), draw(st.integers(0, 5)))
    request = generate("r", tokens, new, n=n, search=search, ignore_eos=False)
    expect_equal(ours(shared(build), request, eos), diverse(dequantized, tokens, new, n, search, eos))


def test_a_penalty_makes_groups_differ(build: Any, generate: Any) -> None:
    found = []
    for penalty in (0.0, 5.0):
        search = BeamSearch(4, groups=4, diversity_penalty=penalty)
        found.append([tokens for tokens, _ in ours(build(), generate("r", prompt(9), 8, n=4, search=search), ())])
    assert len({tuple(tokens) for tokens in found[0]}) == 1
    assert len({tokens[0] for tokens in found[1]}) == 4


# ---------------------------------------------------------------- beams in the house


def test_log_probabilities_are_those_of_sampling_the_same_text(build: Any, generate: Any) -> None:
    search = BeamSearch(3, 0.0)
    engine: LocalEngine = build()
    answer = engine.generate(generate("r", prompt(20), 7, n=2, search=search, logprobs=2))[0]
    for index in (0, 1):
        completion = answer.completions[index]
        text = prompt(20) + completion.token_ids
        score = engine.generate(generate(f"s{index}", text, 0, prompt_logprobs_from=20, logprobs=2))[0]
        assert [each.token_id for each in completion.logprobs] == completion.token_ids
        assert score.prompt_logprobs is not None
        for one, other in zip(completion.logprobs, score.prompt_logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5) and one.rank == other.rank
            assert [top.token_id for top in one.top] == [top.token_id for top in other.top]
        assert completion.score == pytest.approx(sum(each.logprob for each in completion.logprobs), rel=1e-5)


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_beams_share_blocks_and_copy_only_the_last_of_a_fork(build: Any, generate: Any, length: int) -> None:
    """A fork whose last block is not full costs one copy of it; beams that are reordered cost nothing else."""
    engine: LocalEngine = build()
    scheduler, width, new = engine.engine.scheduler, 4, 24
    forks = [0]
    partial = [0]  # forks off a text whose last block is not full
    fork = scheduler.fork

    def counting(parent: Any, index: int) -> Any:
        forks[0] += 1
        partial[0] += parent.length % 16 > 0
        return fork(parent, index)

    scheduler.fork = counting  # type: ignore[method-assign]
    copies: list[int] = []
    copy_blocks = engine.engine.runner.kv.copy_blocks
    engine.engine.runner.kv.copy_blocks = lambda each: (copies.append(len(each)), copy_blocks(each))[1]  # type: ignore[method-assign,assignment,func-returns-value]
    engine.send(generate("r", prompt(length), new, n=width, search=BeamSearch(width)))
    while engine.step() or scheduler.requests:
        scheduler.check()
        full = length // 16
        held = len({block for sequence in scheduler.running for block in sequence.table.blocks})
        assert held == scheduler.allocator.used <= full + width * (-(-(length + new) // 16) - full)
        for sequence in scheduler.running:
            assert sequence.table.blocks[:full] == scheduler.running[0].table.blocks[:full]
    assert forks[0] > 3, "the beams of this prompt never change places"
    assert 0 < sum(copies) <= partial[0]
    assert len(ranked(engine.answers["r"])) == width


MIX = [
    {"search": BeamSearch(4), "n": 2},
    {"temperature": 1.0, "seed": 5, "n": 2},
    {"search": BeamSearch(4, 0.0, EarlyStopping.FIRST, 2, 0.7), "n": 4, "adapters": {"a": 1.0}},
    {"adapters": {"b": 1.0, "c": -0.5}},
    {"search": ContrastiveSearch(5, 0.6), "adapters": {"a": 0.5, "e": 1.0}},
    {"search": ContrastiveSearch(3, 0.4)},
    {"search": BeamSearch(3, 2.0, EarlyStopping.NEVER), "n": 1, "adapters": {"b": 1.0, "c": -0.5}},
    {"temperature": 0.8, "seed": 9, "adapters": {"a": 1.0}},
]


def mix(generate: Any) -> list[Generate]:
    return [
        generate(str(number), prompt(6 + 5 * number, number), 44 - number, stop=(40,), min_new=3 * number, **wish)
        for number, wish in enumerate(MIX)
    ]


def said(answer: Answer) -> list[tuple[list[int], float | None, FinishReason | None]]:
    assert answer.error is None, answer.error
    found = [answer.completions[index] for index in sorted(answer.completions)]
    return [(each.token_ids, each.score, each.finish) for each in found]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {}


def solo(build: Any, generate: Any, alone: dict[str, Any]) -> dict[str, Any]:
    """Each request of the mix as an engine of its own answers it."""
    if not alone:
        engine: LocalEngine = build()
        alone |= {request.request_id: said(engine.generate(request)[0]) for request in mix(generate)}
    return alone


def expect_same(engine: LocalEngine, requests: list[Generate], wanted: dict[str, Any]) -> None:
    for request in requests:
        found, expected = said(engine.answers[request.request_id]), wanted[request.request_id]
        assert [(tokens, finish) for tokens, _, finish in found] == [(tokens, end) for tokens, _, end in expected]
        for (_, score, _), (_, other, _) in zip(found, expected, strict=True):
            assert score == (other if other is None else pytest.approx(other, rel=1e-5))
        assert sorted(engine.answers[request.request_id].completions) == list(range(request.sampling.n))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [9, 64])
def test_a_mixed_batch_gives_each_what_it_gets_alone(
    build: Any, generate: Any, alone: dict[str, Any], budget: int, ahead: bool
) -> None:
    engine: LocalEngine = build(max_running=32, token_budget=budget, ahead=ahead)
    requests = mix(generate)
    engine.generate(*requests)
    expect_same(engine, requests, solo(build, generate, alone))


@pytest.mark.parametrize(("blocks", "priority"), [(16, 0), (17, 1)])
def test_memory_pressure_changes_nothing(
    build: Any, generate: Any, alone: dict[str, Any], blocks: int, priority: int
) -> None:
    """Searches are preempted whole and come back; the pool just holds the largest of them."""
    engine: LocalEngine = build(blocks=blocks, max_running=12, token_budget=30)
    requests = [
        Generate(**{name: getattr(each, name) for name in each.__struct_fields__} | {"priority": number * priority})
        for number, each in enumerate(mix(generate))
    ]
    engine.send(*requests)
    preempted: set[str] = set()
    for _ in range(1500):
        engine.step()
        engine.engine.scheduler.check()
        preempted |= {each.request.id for each in engine.engine.scheduler.waiting if each.status.value == "preempted"}
        if not engine.engine.scheduler.requests:
            break
    starving = list(engine.engine.scheduler.requests)
    engine.run(*(Abort(name) for name in starving))
    assert not starving
    expect_same(engine, requests, solo(build, generate, alone))
    searches = {each.request_id for each in requests if each.sampling.search is not None}
    assert preempted & searches, "no search was preempted"


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 15])
@pytest.mark.parametrize("way", ["all", "first", "second", "deadline", "time limit"])
def test_ends_from_outside(build: Any, generate: Any, steps: int, way: str) -> None:
    now, search = 1000.0, BeamSearch(4, groups=2, diversity_penalty=1.0)
    engine: LocalEngine = build(token_budget=16)
    engine.engine.clock = lambda: now
    limits = {"deadline": {"deadline": now + 5}, "time limit": {"time_limit": 5.0}}.get(way, {})
    engine.send(generate("r", prompt(30), 20, n=2, search=search, arrival=now, **limits))
    for _ in range(steps):
        engine.step()
    now += 6
    if way in ("all", "first", "second"):
        engine.send(Abort("r", {"all": None, "first": 0, "second": 1}[way]))
    engine.step()
    engine.engine.check()
    answer = engine.answers["r"]
    if way == "deadline":
        assert isinstance(answer.error, DeadlineExceeded)
    elif way in ("all", "time limit"):
        reason = FinishReason.ABORTED if way == "all" else FinishReason.TIME_LIMIT
        found = said(answer)
        assert [finish for _, _, finish in found] == [reason] * 2
        longest = max(steps - 1, 0) if way == "time limit" else 0
        assert {len(tokens) for tokens, _, _ in found} == {longest}
        assert all((score is not None) == (longest > 0) for _, score, _ in found)
    else:
        index = 0 if way == "first" else 1
        assert answer.completions[index].finish is FinishReason.ABORTED and not answer.tokens(index)
        engine.run()
        best = answer.completions[1 - index]
        whole = said(build().generate(generate("r", prompt(30), 20, n=2, search=search))[0])
        assert (best.token_ids, best.finish) == (whole[0][0], whole[0][2])
    engine.run()
    assert engine.engine.scheduler.allocator.used == 0 and not engine.engine.scheduler.requests
    ends = [m.index for m in engine.messages if isinstance(m, Tokens) and m.finish is not None]
    assert sorted(ends) == ([] if way == "deadline" else [0, 1])
    strategy: Any = engine.engine.committer.strategy.inner.inner  # type: ignore[attr-defined]
    assert not strategy.searches[BeamSearch]._searches


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({"search": BeamSearch(5)}, {"max_running": 4}, InvalidField, "beam.width is 5, at most 4"),
        ({"search": ContrastiveSearch(5, 0.5)}, {"max_running": 4}, InvalidField, "contrastive.top_k is 5"),
        ({"search": BeamSearch(2), "new": 281}, {}, PromptTooLong, "20 tokens and 281 are wanted"),
        ({"search": BeamSearch(5), "new": 45}, {"blocks": 20}, OutOfMemory, "may need 21 blocks, there are 20"),
    ],
)
def test_what_could_not_run_to_its_end_is_refused(
    build: Any, generate: Any, changes: dict[str, Any], options: dict[str, Any], error: type, words: str
) -> None:
    answer = build(**options).generate(generate("r", prompt(20), **changes))[0]
    assert type(answer.error) is error and words in answer.error.message


def test_a_search_that_just_fits_runs(build: Any, generate: Any) -> None:
    request = generate("r", prompt(20), 45, n=5, search=BeamSearch(5))
    assert said(build(blocks=21).generate(request)[0]) == said(build().generate(request)[0])


def test_fewer_answers_than_asked_for_leave_empty_ones(build: Any, generate: Any) -> None:
    """Where all but two tokens are forbidden there are two answers of one token."""
    engine: LocalEngine = build()
    bias = {token_id: float("-inf") for token_id in range(131) if token_id not in (7, 9)}
    found = said(
        engine.generate(generate("r", prompt(5), 1, n=4, search=BeamSearch(4), shaping={"logit_bias": bias}))[0]
    )
    assert [tokens for tokens, _, _ in found[:2]] in ([[7], [9]], [[9], [7]])
    assert found[2:] == [([], None, FinishReason.LENGTH)] * 2
    nothing = dict.fromkeys(range(131), float("-inf"))
    requests = [
        generate("r", prompt(5), 3, search=BeamSearch(4), shaping={"logit_bias": nothing}),
        generate("c", prompt(5), 3, search=ContrastiveSearch(4, 0.5), shaping={"logit_bias": nothing}),
        generate("b", prompt(8), 12, n=2, search=BeamSearch(3)),
        generate("s", prompt(9), 12, search=ContrastiveSearch(3, 0.6)),
        generate("g", prompt(9), 12),
    ]
    answers = engine.generate(*requests)
    assert [answer.error is not None for answer in answers] == [True, True, False, False, False]
    wanted = {each.request_id: said(build().generate(each)[0]) for each in requests[2:]}
    expect_same(engine, requests[2:], wanted)  # they were decided twice in one step


def test_a_step_that_fails_is_run_search_by_search(build: Any, generate: Any) -> None:
    requests = [
        generate("b", prompt(8), 12, n=2, search=BeamSearch(3)),
        generate("bad", prompt(7), 12, n=2, search=BeamSearch(3)),
        generate("c", prompt(20), 12, search=ContrastiveSearch(3, 0.6)),
        generate("g", prompt(9), 12),
    ]
    good = [requests[0], *requests[2:]]
    wanted = {each.request_id: said(answer) for each, answer in zip(good, build().generate(*good), strict=True)}
    engine: LocalEngine = build()
    forward = engine.engine.runner.forward

    def failing(batch: Any) -> Any:
        if any(piece.sequence.request.id == "bad" and piece.start > 9 for piece in batch.pieces):
            raise ZeroDivisionError
        return forward(batch)

    engine.engine.runner.forward = failing  # type: ignore[method-assign]
    assert engine.generate(*requests)[1].error is not None
    expect_same(engine, good, wanted)
