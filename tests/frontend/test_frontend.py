"""The frontend over a scripted engine: requests, aborts, limits, deaths and drains."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from fake_engine import DIE, ECHO, FOREVER, REFUSE, STALL

from lorry.server.engine.messages import FinishReason, SamplingParams
from lorry.server.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Draining,
    EngineUnavailable,
    InvalidField,
    NotFound,
    PromptTooLong,
    QueueFull,
)
from lorry.server.frontend import frontend as frontend_module
from lorry.server.frontend.engine_process import EngineFailed
from lorry.server.frontend.interface import ChangeKind, State
from lorry.server.frontend.request import (
    ChatMessage,
    ChatPrompt,
    Delta,
    Finished,
    PromptLogprobs,
    Request,
    ResponseOptions,
    Started,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
)


def request(*ids, **fields):
    return Request(prompt=TokenPrompt(ids), **fields)


async def collect(frontend, wish):
    async with await frontend.submit(wish) as handle:
        return [event async for event in handle]


async def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


async def test_a_request_is_answered_event_by_event(serving, tokenizer):
    async with serving() as frontend:
        ids = tokenizer.encode("the quick 你好 🎉", add_special_tokens=False)
        wish = request(ECHO, *ids, sampling=SamplingParams(n=3, seed=5), request_id="mine")
        started, *events = await collect(frontend, wish)
        assert started == Started("mine", len(ids) + 1, 0, ())
        for index in range(3):
            mine = [event for event in events if event.index == index]
            *deltas, end = mine
            assert "".join(delta.text for delta in deltas) == "the quick 你好 🎉"
            assert [token for delta in deltas for token in delta.token_ids] == ids
            assert (end.reason, end.usage.completion_tokens) == (FinishReason.LENGTH, len(ids))
            assert (end.timings.queue, end.timings.prefill, end.timings.decode) == (0.1, 0.2, 0.3)
        assert frontend.load().in_flight == 0


async def test_a_stop_string_ends_the_sequence_in_the_engine(serving, seen, tokenizer):
    async with serving() as frontend:
        ids = tokenizer.encode("the lazy dog sleeps", add_special_tokens=False)
        wish = request(
            ECHO, *ids, stopping=StoppingCriteria(stop=("dog s",)), response=ResponseOptions(include_prompt=True)
        )
        _, *deltas, end = await collect(frontend, wish)
        prompt = tokenizer.decode([ECHO, *ids], skip_special_tokens=False)
        assert "".join(delta.text for delta in deltas) == prompt + "the lazy "
        assert (end.reason, end.stop) == (FinishReason.STOP, "dog s")
        await until(lambda: len(seen("Abort")) == 1)
        assert "index=0" in seen("Abort")[0]


@pytest.mark.parametrize("how", ["close", "deadline", "cancel"])
async def test_an_early_end_tells_the_engine_once(serving, seen, how):
    async with serving() as frontend:
        deadline = time.time() + 0.3 if how == "deadline" else None
        handle = await frontend.submit(request(FOREVER, deadline=deadline))
        reader = asyncio.create_task(anext_of(handle))
        if how == "deadline":
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(reader, 60)
            assert time.time() > deadline - 0.1
        elif how == "cancel":
            await asyncio.sleep(0.1)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        handle.close()
        handle.close()
        handle.abort()
        assert frontend.load().in_flight == 0
        await collect(frontend, request(ECHO, 30))
        await until(lambda: len(seen("Generate")) == 2)
        assert len(seen("Abort")) == 1
        assert frontend.state is State.SERVING


async def anext_of(handle):
    async with handle:
        async for _ in handle:
            pass


async def test_an_aborted_request_keeps_what_is_there(serving, seen):
    async with serving() as frontend:
        handle = await frontend.submit(request(FOREVER, request_id="x"))
        assert isinstance(await anext(handle), Started)
        assert isinstance(await anext(handle), Delta)
        assert frontend.abort("x")
        *_, end = [event async for event in handle]
        assert end.reason is FinishReason.ABORTED
        assert end.usage.completion_tokens > 0
        assert not frontend.abort("x")

        stalled = await frontend.submit(request(STALL, request_id="y"))
        frontend.abort("y")
        events = [event async for event in stalled]
        assert [type(event) for event in events] == [Started, Finished]
        await until(lambda: len(seen("Abort")) == 2)


async def test_a_slow_reader_costs_one_pending_delta_and_slows_nobody(serving):
    async with serving() as frontend:
        slow = await frontend.submit(request(FOREVER))
        assert isinstance(await anext(slow), Started)
        fast = await frontend.submit(request(FOREVER))
        got = 0
        async for event in fast:
            got += len(getattr(event, "token_ids", ()))
            if got > 100:
                break
        fast.close()
        delta = await anext(slow)
        assert len(delta.token_ids) >= 100
        slow.close()


async def test_limits_are_kept(serving):
    async with serving(max_waiting=2) as frontend:
        one = await frontend.submit(request(STALL, request_id="a"))
        with pytest.raises(AlreadyExists) as taken:
            await frontend.submit(request(STALL, request_id="a"))
        assert taken.value.fields == {"resource_type": "request", "resource_name": "a"}
        two = await frontend.submit(request(STALL))
        with pytest.raises(QueueFull):
            await frontend.submit(request(STALL))
        one.close()
        three = await frontend.submit(request(FOREVER, request_id="a"))
        assert isinstance(await anext(three), Started)
        four = await frontend.submit(request(STALL))
        for handle in (two, three, four):
            handle.close()


async def test_what_the_model_cannot_do_is_refused_by_name(serving):
    async with serving() as frontend:
        with pytest.raises(PromptTooLong) as long:
            await frontend.submit(request(*[ECHO] * 200))
        assert long.value.fields == {"prompt_tokens": "200", "max_new_tokens": "1", "context_length": "200"}
        with pytest.raises(PromptTooLong):
            await frontend.submit(request(*[ECHO] * 5, stopping=StoppingCriteria(max_new_tokens=196)))
        with pytest.raises(InvalidField, match="no tokens"):
            await frontend.submit(request())
        with pytest.raises(InvalidField, match="token id 400") as bad:
            await frontend.submit(request(ECHO, 400))
        assert bad.value.fields["field"] == "prompt"
        with pytest.raises(InvalidField, match="min_new_tokens 196"):
            await frontend.submit(request(*[ECHO] * 5, stopping=StoppingCriteria(min_new_tokens=196)))
        with pytest.raises(InvalidField, match="chat template"):
            await frontend.submit(Request(prompt=ChatPrompt((ChatMessage("user", "hi"),))))
        with pytest.raises(DeadlineExceeded):
            await frontend.submit(request(ECHO, deadline=time.time() - 1))
        with pytest.raises(NotFound) as unknown:
            await collect(frontend, request(REFUSE))
        assert unknown.value.fields == {"resource_name": "x"}
        assert frontend.load().in_flight == 0


async def test_scores_and_prompt_logprobs(serving):
    async with serving() as frontend:
        score = await frontend.score(TokenPrompt((ECHO, 9)), [20, 30, 50])
        assert score.logprobs == pytest.approx((-0.2, -0.3, -0.5))
        assert score.greedy_token_ids == (21, 31, 51)
        assert score.entropies == ()
        score = await frontend.score(TokenPrompt((ECHO, 9)), [20, 30, 50], entropy=True)
        assert score.entropies == pytest.approx((0.4, 0.6, 1.0))
        with pytest.raises(InvalidField):
            await frontend.score(TokenPrompt((ECHO,)), [])
        wish = request(ECHO, 20, 30, response=ResponseOptions(prompt_logprobs=True))
        events = await collect(frontend, wish)
        assert [entry.token_id for entry in events[1].logprobs] == [20, 30]
        alone = request(ECHO, response=ResponseOptions(prompt_logprobs=True))
        assert (await collect(frontend, alone))[1] == PromptLogprobs(())


async def test_a_score_says_where_its_prompt_ends(serving, monkeypatch):
    """What invokes an adapter is looked for in the prompt, not in the continuation."""
    async with serving() as frontend:
        sent, send = [], frontend._engine.send
        monkeypatch.setattr(frontend._engine, "send", lambda command: (sent.append(command), send(command))[1])
        await frontend.score(TokenPrompt((ECHO, 9)), [20, 30, 50])
        await collect(frontend, request(ECHO, 20, response=ResponseOptions(prompt_logprobs=True)))
        assert [(each.prompt_end, each.prompt_logprobs_from) for each in sent] == [(2, 2), (None, 1)]


async def test_tokenize_and_detokenize(serving, tokenizer):
    async with serving() as frontend:
        long = "the dog " * 1000
        for text in ("the dog", long):
            assert await frontend.tokenize(TextPrompt(text)) == tokenizer.encode(text)
            bare = await frontend.tokenize(TextPrompt(text), add_special_tokens=False)
            assert await frontend.detokenize(bare) == text


async def test_death_ends_every_request_and_the_engine_comes_back(serving):
    async with serving() as frontend:
        states = []

        async def follow():
            async for state in frontend.watch_state():
                states.append(state)  # noqa: PERF401 (it never ends)

        follower = asyncio.create_task(follow())
        await asyncio.sleep(0)
        first_pid = frontend.engine_pid
        handles = [await frontend.submit(request(kind)) for kind in (FOREVER, FOREVER, STALL)]
        os.kill(first_pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            for handle in handles:
                with pytest.raises(EngineUnavailable):
                    await anext_of(handle)
        assert frontend.state is State.DOWN, "they did not end before the engine was back"
        with pytest.raises(EngineUnavailable, match="started again"):
            await frontend.submit(request(ECHO, 30))
        await until(lambda: frontend.state is State.SERVING)
        assert (await collect(frontend, request(ECHO, 30)))[-1].reason is FinishReason.LENGTH
        assert frontend.engine_pid != first_pid

        with pytest.raises(EngineUnavailable):
            await collect(frontend, request(DIE))
        lives = [State.SERVING, State.DOWN, State.SERVING, State.DOWN, State.SERVING]
        await until(lambda: states == lives)  # its watcher's turn comes after the state
        follower.cancel()


async def test_an_engine_that_fails_again_and_again_is_tried_again(serving, tmp_path, caplog):
    mark = tmp_path / "mark"
    async with serving(f"once={mark}") as frontend:
        os.kill(frontend.engine_pid, signal.SIGKILL)
        await until(lambda: sum("exited with 1" in line for line in caplog.messages) >= 2)
        assert frontend.state is State.DOWN
        mark.unlink()
        await until(lambda: frontend.state is State.SERVING)


async def test_an_engine_that_is_never_ready_says_why(serving):
    with pytest.raises(EngineFailed, match=r"exited with 3 .* no model 'fail'"):
        async with serving("fail"):
            pass


async def test_adapters_are_loaded_watched_and_restored(serving, seen):
    async with serving("slow") as frontend:
        adapters = frontend.adapters
        changes = []

        async def follow():
            async for change in adapters.watch():
                changes.append((change.kind, change.adapter.id))  # noqa: PERF401 (it never ends)

        follower = asyncio.create_task(follow())
        await adapters.load("b", "folder/b")
        await adapters.load("a", "folder/a", pin=True)
        assert [info.id for info in await adapters.list()] == ["a", "b"]
        with pytest.raises(NotFound):
            await adapters.unload("c")
        await adapters.unload("b")
        await until(lambda: len(changes) == 3)
        assert changes == [(ChangeKind.CHANGED, "b"), (ChangeKind.CHANGED, "a"), (ChangeKind.REMOVED, "b")]
        only = aiter(adapters.watch(["a"]))
        first = await anext(only)
        assert (first.kind, first.adapter.id) == (ChangeKind.PRESENT, "a")
        await only.aclose()

        os.kill(frontend.engine_pid, signal.SIGKILL)
        await until(lambda: frontend.state is State.DOWN)
        with pytest.raises(EngineUnavailable):
            await adapters.list()
        await until(lambda: frontend.state is State.SERVING)
        assert [(info.id, info.pinned) for info in await adapters.list()] == [("a", True)]
        await until(lambda: "replace=True" in seen("LoadAdapter")[-1])
        follower.cancel()


async def test_a_drain_lets_streams_finish_and_then_ends_them(serving, monkeypatch):
    monkeypatch.setattr(frontend_module, "LAST_READ_SECONDS", 600.0)
    async with serving(drain_timeout=30.0) as frontend:
        handle = await frontend.submit(request(FOREVER))
        assert frontend.drain() == 1
        assert frontend.state is State.DRAINING
        with pytest.raises(Draining):
            await frontend.submit(request(ECHO, 30))
        waiter = asyncio.create_task(frontend.drained())
        assert isinstance(await anext(handle), Started)
        assert isinstance(await anext(handle), Delta)
        assert not waiter.done()
        assert frontend.drain(0.2) == 1
        *_, end = [event async for event in handle]
        assert end.reason is FinishReason.ABORTED
        await asyncio.wait_for(waiter, 60)


async def test_a_drain_does_not_wait_for_a_reader_that_stalls(serving, monkeypatch):
    monkeypatch.setattr(frontend_module, "LAST_READ_SECONDS", 0.1)
    async with serving() as frontend:
        await frontend.submit(request(FOREVER))
        frontend.drain(0.1)
        await asyncio.wait_for(frontend.drained(), 60)
        assert frontend.load().in_flight == 1


async def test_metrics_follow_the_traffic(serving):
    async with serving() as frontend:
        await collect(frontend, request(ECHO, 30, 40, 50))
        (await frontend.submit(request(FOREVER))).close()
        page = frontend.metrics.page().decode()
        for line in (
            "lorry_generation_tokens_total 3.0",
            "lorry_prompt_tokens_total 4.0",
            'lorry_requests_finished_total{reason="length"} 1.0',
            'lorry_requests_finished_total{reason="cancelled"} 1.0',
            "lorry_time_to_first_token_seconds_count 1.0",
            "lorry_inter_token_latency_seconds_count 2.0",
            "lorry_e2e_request_latency_seconds_count 1.0",
            "lorry_engine_up 1.0",
            "lorry_requests_running 1.0",
        ):
            assert line in page, line
        assert (frontend.load().running, frontend.load().waiting) == (1, 2)
        assert frontend.model_info.name == "fake"
