"""The engine with all its real parts in one process, on a tiny random Llama in float32."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.server.config import EngineConfig
from lorry.server.engine.build import Types, describe
from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.engine.messages import (
    Abort,
    FinishReason,
    Generate,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    Started,
    Stats,
    Tokens,
    UnloadAdapter,
)
from lorry.server.errors import (
    DeadlineExceeded,
    InvalidField,
    MalformedAdapter,
    NotFound,
    PromptTooLong,
    RevisionMismatch,
)

LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 90)

MIXES: dict[str, list[dict[str, float]]] = {
    "none": [{}] * 12,
    "one": [{"a": 1.0}] + [{}] * 11,
    "all same": [{"b": 1.0}] * 12,
    "all distinct": [{name: 1.0} for name in "abcdefgh"] + [{}] * 4,
    "zipf": [{name: 1.0} for name in "aaaaaabbbccd"],
    "skewed": [{"e": 1.0}] * 11 + [{"f": 1.0}],
    "mixed ranks": [{name: 1.0} for name in "fehcfehcfehc"],
    "weighted mixes": [{"a": 0.5, "b": -0.25}, {"b": 1.0, "a": 1.0}, {"c": 2.0}, dict.fromkeys("abcdefgh", 0.3)] * 3,
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(2, 131), k=length)


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    for answer in answers:
        assert answer.error is None, answer.error
    return [answer.tokens() for answer in answers]


def test_a_cache_in_e4m3_holds_four_times_the_tokens_of_float32(build: Any, generate: Any) -> None:
    """And serves where blocks are shared and copied."""
    wide, narrow = build(70), build(70, kv_dtype="fp8")
    assert narrow.engine.runner.kv.num_blocks == 4 * wide.engine.runner.kv.num_blocks == 280
    config = EngineConfig(kv_dtype="fp8")
    assert describe(config, Types.choose(config), narrow.engine).kv_dtype == "float8_e4m3fn"
    forks = [narrow.generate(generate("n", prompt(30), 40, n=3, temperature=1.0, seed=5))[0] for _ in range(2)]
    assert len({tuple(forks[0].tokens(index)) for index in range(3)}) == 3
    assert [forks[1].tokens(index) for index in range(3)] == [forks[0].tokens(index) for index in range(3)]


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.05), ("fp8", 0.2)])
def test_pages_in_8_bits_hold_twice_the_adapters(build: Any, generate: Any, dtype: str, most: float) -> None:
    wide, narrow = build(), build(adapter_dtype=dtype)
    halved = build(adapter_dtype="bfloat16").engine.adapters.manager.pool
    pool = narrow.engine.adapters.manager.pool
    assert 1.8 < pool.room() / halved.room() < 2.1 or pool.room() == pool.max_slots
    requests = [
        generate(name, prompt(30), 0, adapters={name: 1.0} if name else {}, logprobs=0, prompt_logprobs_from=1)
        for name in ("", "a", "c", "e")
    ]
    for request, exact, rounded in zip(requests, wide.generate(*requests), narrow.generate(*requests), strict=True):
        one, other = (torch.tensor([each.logprob for each in a.prompt_logprobs or ()]) for a in (exact, rounded))
        error = float((one - other).square().mean().sqrt())
        assert (0 < error < most) if request.adapters else error == 0


@pytest.mark.parametrize("mix", MIXES)
def test_each_row_of_a_mixed_batch_equals_its_solo_run(build: Any, generate: Any, mix: str) -> None:
    requests = [
        generate(str(i), prompt(length), 4 + i % 5, temperature=0.9 * (i % 2), seed=i, adapters=adapters)
        for i, (length, adapters) in enumerate(zip(LENGTHS, MIXES[mix], strict=True))
    ]
    together = tokens_of(build().generate(*requests))
    solo = build()
    alone = [tokens_of(solo.generate(request))[0] for request in requests]
    assert together == alone
    assert [len(tokens) for tokens in together] == [4 + i % 5 for i in range(12)]


def test_adapters_change_the_tokens(build: Any, generate: Any) -> None:
    combos: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5}, {"a": -1.0}, {"a": 1.0, "b": 1.0}]
    answers = build().generate(*(generate(str(i), prompt(20), adapters=each) for i, each in enumerate(combos)))
    assert len({tuple(tokens) for tokens in tokens_of(answers)}) == len(combos)


@pytest.mark.parametrize("budget", [1, 15, 16, 17, 33])
def test_chunked_prefill_equals_unchunked(build: Any, generate: Any, budget: int) -> None:
    requests = [generate(str(length), prompt(length), adapters={"c": 1.0}) for length in LENGTHS]
    whole = tokens_of(build(token_budget=2000).generate(*requests))
    assert tokens_of(build(token_budget=budget).generate(*requests)) == whole


def test_preemption_changes_no_token(build: Any, generate: Any) -> None:
    requests = [generate(str(i), prompt(20 + i, i), 40, adapters={"abc"[i % 3]: 1.0}, priority=i % 2) for i in range(6)]
    requests.append(generate("n", prompt(30), 40, n=3, temperature=1.0, seed=5))
    roomy, tight = build(), build(blocks=8)
    expected = roomy.generate(*requests)
    actual = tight.generate(*requests)
    assert roomy.engine.scheduler.preemptions == 0
    assert tight.engine.scheduler.preemptions >= 3
    assert tokens_of(actual) == tokens_of(expected)
    assert [actual[-1].tokens(i) for i in range(3)] == [expected[-1].tokens(i) for i in range(3)]
    assert sum(stats.preemptions for stats in tight.messages if isinstance(stats, Stats)) > 0


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_n_shares_the_blocks_of_its_prompt(build: Any, generate: Any, length: int) -> None:
    engine: LocalEngine = build()
    engine.send(generate("n", prompt(length), 20, n=4, temperature=1.0, seed=3))
    engine.step()
    full, partial = divmod(length, 16)
    assert engine.engine.scheduler.allocator.used == full + (partial > 0)
    engine.step()
    assert engine.engine.scheduler.allocator.used == full + 4
    engine.run()
    answer = engine.answers["n"]
    assert sorted(answer.completions) == [0, 1, 2, 3]
    assert all(len(answer.tokens(i)) == 20 for i in range(4))
    assert len({tuple(answer.tokens(i)) for i in range(4)}) == 4
    fewer = build().generate(generate("n", prompt(length), 20, n=2, temperature=1.0, seed=3))[0]
    assert [fewer.tokens(i) for i in range(2)] == [answer.tokens(i) for i in range(2)]


def test_a_prefix_that_is_found_equals_a_cold_one(build: Any, generate: Any) -> None:
    text = prompt(70)
    engine: LocalEngine = build()
    cold = engine.generate(generate("cold", text, adapters={"a": 1.0}))[0]
    again = engine.generate(generate("again", text, adapters={"a": 1.0}))[0]
    longer = engine.generate(generate("longer", text + cold.tokens()[:5], 7, adapters={"a": 1.0}))[0]
    others = engine.generate(
        generate("base", text),
        generate("weight", text, adapters={"a": 0.5}),
        generate("salt", text, adapters={"a": 1.0}, cache_salt="s"),
    )
    assert again.tokens() == cold.tokens() == others[2].tokens()
    assert longer.tokens() == cold.tokens()[5:]
    assert again.started is not None and again.started.cached_tokens == 64
    assert longer.started is not None and longer.started.cached_tokens == 64
    assert [other.started and other.started.cached_tokens for other in others] == [0, 0, 0]
    fresh = build().generate(generate("base", text), generate("weight", text, adapters={"a": 0.5}))
    assert tokens_of(fresh) == tokens_of(others)[:2]


@pytest.mark.parametrize("phase", ["queued", "waiting", "prefill", "decode", "forked", "adapter"])
@pytest.mark.parametrize("index", [None, 0, 1])
def test_abort_frees_everything(build: Any, generate: Any, phase: str, index: int | None) -> None:
    engine: LocalEngine = build(max_running=4, token_budget=16)
    other = generate("other", prompt(9), 30, n=3 if phase == "waiting" else 1)
    engine.send(other)
    engine.step()
    adapters = {"a": 1.0} if phase == "adapter" else {}
    engine.send(generate("victim", prompt(40), 50, n=2, adapters=adapters))
    for _ in range({"queued": 0, "waiting": 1, "adapter": 1, "prefill": 2, "decode": 5, "forked": 9}[phase]):
        engine.step()
    engine.send(Abort("victim", index), Abort("unknown"))
    engine.step()
    victim = engine.answers["victim"]
    finished = [i for i in (0, 1) if i in victim.completions and victim.completions[i].finish is not None]
    assert finished == ([0, 1] if index is None else [index])
    assert all(victim.completions[i].finish is FinishReason.ABORTED for i in finished)
    engine.engine.check()
    if index is None:
        assert "victim" not in engine.engine.scheduler.requests
    engine.run()
    assert sum(m.finish is not None for m in engine.messages if isinstance(m, Tokens) and m.request_id == "victim") == 2
    if index is not None:
        assert victim.completions[1 - index].finish is FinishReason.LENGTH
        assert len(victim.tokens(1 - index)) == 50
    assert len(engine.answers["other"].tokens()) == 30


def test_a_replaced_adapter_serves_the_streams_that_began_with_it(
    build: Any, generate: Any, write_adapter: Any, decoder: Any, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "old", decoder, 4, 100)
    write_adapter(tmp_path / "new", decoder, 9, 101)
    engine: LocalEngine = build(adapter_roots=(str(tmp_path),))
    text = prompt(40)
    engine.run(LoadAdapter(1, "x", "old"))
    old = engine.generate(generate("old", text, 30, adapters={"x": 1.0}))[0]
    engine.send(generate("stream", text, 30, adapters={"x": 1.0}))
    for _ in range(5):
        engine.step()
    engine.send(LoadAdapter(2, "x", "new", replace=True))
    while 2 not in engine.replies:
        engine.step()
    assert engine.replies[2].error is None
    assert "stream" in engine.engine.scheduler.requests
    new = engine.generate(generate("new", text, 30, adapters={"x": 1.0}))[0]
    stream = engine.answers["stream"]
    assert stream.tokens() == old.tokens() != new.tokens()
    assert old.started and stream.started and new.started
    assert old.started.adapters == stream.started.adapters
    assert new.started.adapters[0].revision not in (None, "", old.started.adapters[0].revision)
    assert new.started.cached_tokens == 0, "keys and values of another revision were used"
    lone = build(adapter_roots=(str(tmp_path),))
    lone.run(LoadAdapter(1, "x", "new"))
    assert tokens_of(lone.generate(generate("new", text, 30, adapters={"x": 1.0}))) == [new.tokens()]


def test_adapter_commands(build: Any, adapters_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters_dir / "a", tmp_path / "copy")
    engine: LocalEngine = build(adapter_roots=(str(tmp_path),))
    engine.run(GetAdapters(1), GetAdapters(2, "a"), GetAdapters(3, "nobody"), UnloadAdapter(4, "nobody"))
    assert [info.id for info in engine.replies[1].adapters] == [*"abcdefgh"[:2], "broken", *"cdefgh"]
    assert engine.replies[2].adapters[0].id == "a"
    engine.run(GetAdapters(12, after="b", limit=3))
    assert [info.id for info in engine.replies[12].adapters] == ["broken", "c", "d"]
    for call in (3, 4):
        error = engine.replies[call].error
        assert error is not None and error.kind == "NotFound"
        assert error.fields["resource_type"] == "adapter" and error.fields["resource_name"] == "nobody"
    engine.run(LoadAdapter(5, "y", "copy", pin=True), LoadAdapter(6, "z", "broken"), LoadAdapter(7, "b", "copy"))
    loaded = engine.replies[5].adapters[0]
    assert loaded.pinned and loaded.rank == 3 and len(loaded.revision) == 64 and loaded.bytes > 0
    for call, kind in ((6, "MalformedAdapter"), (7, "AlreadyExists")):
        error = engine.replies[call].error
        assert error is not None and error.kind == kind
    engine.run(PinAdapter(8, "y", False), UnloadAdapter(9, "y"))
    assert not engine.replies[8].adapters[0].pinned
    assert engine.replies[9].error is None


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"adapters": {"nobody": 1.0}}, NotFound),
        ({"adapters": {"broken": 1.0}}, MalformedAdapter),
        ({"prompt": [5] * 300}, PromptTooLong),
        ({"prompt": []}, InvalidField),
        ({"prompt": [5, 131]}, InvalidField),
        ({"prompt": [5, -1]}, InvalidField),
        ({"n": 17}, InvalidField),
        ({"deadline": 1.0}, DeadlineExceeded),
    ],
)
def test_what_cannot_be_served_fails_alone(build: Any, generate: Any, changes: dict[str, Any], error: type) -> None:
    changes = {"prompt": prompt(20), **changes}
    engine: LocalEngine = build()
    bad, good = engine.generate(generate("bad", **changes), generate("good", prompt(17)))
    assert type(bad.error) is error and bad.started is None and not bad.completions
    assert len(good.tokens()) == 12


def test_a_revision_that_is_not_there_is_refused(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    request = generate("r", prompt(5), adapters={"a": 1.0})
    wrong = Generate(
        **{f: getattr(request, f) for f in request.__struct_fields__}
        | {"adapters": (type(request.adapters[0])("a", 1.0, "0" * 64),)}
    )
    assert isinstance(engine.generate(wrong)[0].error, RevisionMismatch)


def test_ends(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    free = engine.generate(generate("free", prompt(8), 20))[0].tokens()
    stop = free[7]
    assert stop not in free[:7]
    stopped, late, none, one = engine.generate(
        generate("stop", prompt(8), 20, stop=(stop,)),
        generate("late", prompt(8), 20, stop=(stop,), min_new=9),
        generate("none", prompt(8), 0, n=2),
        generate("one", prompt(8), 1),
    )
    assert stopped.tokens() == free[:8] and stopped.completions[0].finish is FinishReason.STOP
    assert len(late.tokens()) > 9 and stop not in late.tokens()[:9]
    assert [none.completions[i].finish for i in (0, 1)] == [FinishReason.LENGTH] * 2 and none.tokens() == []
    assert one.tokens() == free[:1]
    full = engine.generate(generate("full", prompt(290), 50))[0]
    assert len(full.tokens()) == 10 and full.completions[0].finish is FinishReason.LENGTH


def test_end_of_sequence(build: Any, generate: Any, decoder: Any) -> None:
    engine: LocalEngine = build()
    free = engine.generate(generate("free", prompt(8), 20))[0].tokens()
    engine.engine.committer.eos_token_ids = (free[5],)
    ended, ignored = engine.generate(
        generate("ended", prompt(8), 20, ignore_eos=False), generate("ignored", prompt(8), 20)
    )
    assert ended.tokens() == free[: free.index(free[5]) + 1]
    assert ended.completions[0].finish is FinishReason.EOS
    assert ignored.tokens() == free
    timings = ended.completions[0].timings
    assert timings is not None and timings.prefill > 0 and timings.decode > 0


def test_time_limit_and_deadline_while_running(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    now = 1000.0
    engine.engine.clock = lambda: now
    engine.send(
        generate("soft", prompt(8), 200, time_limit=5.0, arrival=now),
        generate("hard", prompt(9), 200, deadline=now + 6.0, arrival=now),
    )
    for _ in range(4):
        engine.step()
    now += 5.5
    engine.step()
    soft, hard = engine.answers["soft"], engine.answers["hard"]
    assert soft.completions[0].finish is FinishReason.TIME_LIMIT and len(soft.tokens()) == 4
    assert hard.error is None
    now += 1.0
    engine.step()
    assert isinstance(hard.error, DeadlineExceeded)
    assert not engine.engine.scheduler.requests


@pytest.mark.parametrize("budget", [16, 17, 200])
@pytest.mark.parametrize("first", [0, 1, 15, 16, 17, 39])
def test_prompt_logprobs(build: Any, generate: Any, budget: int, first: int) -> None:
    engine: LocalEngine = build(token_budget=budget)
    text = prompt(40)
    engine.generate(generate("before", text))
    answer = engine.generate(generate("score", text, 3, prompt_logprobs_from=first, logprobs=2))[0]
    assert answer.prompt_logprobs is not None
    assert [each.token_id for each in answer.prompt_logprobs] == text[max(first, 1) :]
    step = engine.generate(generate("step", text[:30], 1, logprobs=131))[0]
    known = {each.token_id: each.logprob for each in step.completions[0].logprobs[0].top}
    if first <= 30:
        scored = answer.prompt_logprobs[30 - max(first, 1)]
        assert scored.logprob == pytest.approx(known[text[30]], abs=1e-5)
        assert [top.token_id for top in scored.top] == list(known)[:2]
    assert len(answer.completions[0].logprobs) == 3


def test_a_command_that_meets_a_bug_is_answered(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    manager = engine.engine.adapters.manager
    manager.get = manager.request = lambda *_: 1 // 0  # type: ignore[method-assign,assignment]
    engine.run(GetAdapters(1, "a"), generate("bad", [5], adapters={"a": 1.0}), generate("good", [5]))
    error = engine.replies[1].error
    assert error is not None and "internal error" in error.message
    assert engine.answers["bad"].error is not None
    assert len(engine.answers["good"].tokens()) == 12


def test_messages_come_in_order(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    engine.generate(*(generate(str(i), prompt(20 + i), n=1 + i % 2, prompt_logprobs_from=5) for i in range(5)))
    for i in range(5):
        mine = [m for m in engine.messages if getattr(m, "request_id", None) == str(i)]
        assert isinstance(mine[0], Started) and mine[0].prompt_tokens == 20 + i
        assert type(mine[1]).__name__ == "PromptLogprobs"
        assert all(isinstance(m, Tokens) for m in mine[2:])
        assert sum(m.finish is not None for m in mine[2:]) == 1 + i % 2  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", [False, True])
def test_random_lives(build: Any, generate: Any, ahead: bool) -> None:
    """Everything at once on a pool of a few adapters and few blocks; each finished answer equals its solo run."""
    random_ = random.Random(11)
    engine: LocalEngine = build(
        blocks=7,
        adapter_memory=800_000,
        adapter_host_memory=8_000_000,
        max_running=6,
        token_budget=40,
        ahead=ahead,
    )
    for name in "abcdfg":  # from now on they are in host memory, and no life depends on the loader's time
        engine.generate(generate(name, prompt(3), 1, adapters={name: 1.0}))
    requests: dict[str, Generate] = {}
    aborted: set[str] = set()
    for step in range(70):
        if random_.random() < 0.4:
            adapters = dict.fromkeys(random_.sample("abcdfg", random_.choice([0, 1, 1, 2])), 1.0)
            request = generate(
                str(step),
                prompt(random_.choice([3, 16, 17, 40]), random_.randrange(3)),
                random_.choice([1, 5, 25]),
                n=random_.choice([1, 1, 2]),
                temperature=random_.choice([0.0, 1.0]),
                seed=step,
                adapters=adapters,
                priority=random_.randrange(3),
            )
            requests[request.request_id] = request
            engine.send(request)
        if random_.random() < 0.05 and requests:
            victim = random_.choice(list(requests))
            aborted.add(victim)
            engine.send(Abort(victim))
        engine.step()
        engine.engine.scheduler.check(under_way=ahead)
        if step % 8 == 0:
            engine.engine.adapters.check()
    engine.run()
    assert engine.engine.scheduler.preemptions > 0
    assert sum(stats.adapter_evictions for stats in engine.messages if isinstance(stats, Stats)) > 0
    solo = build()
    for name, request in requests.items():
        answer = engine.answers[name]
        assert answer.error is None
        assert sorted(answer.completions) == list(range(request.sampling.n))
        if name not in aborted:
            expected = solo.generate(request)[0]
            for index in range(request.sampling.n):
                assert answer.tokens(index) == expected.tokens(index), name


def test_the_engine_needs_no_gradient(build: Any, generate: Any) -> None:
    engine: LocalEngine = build()
    engine.generate(generate("a", prompt(5)))
    assert not any(t.requires_grad for t in engine.engine.runner.kv.keys) and torch.is_grad_enabled()
