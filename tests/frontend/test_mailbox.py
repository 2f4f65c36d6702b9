"""What a reader gets, however slowly it reads."""

from __future__ import annotations

import asyncio

import pytest

from lorry.server.engine.messages import FinishReason, Timings, TokenLogprobs
from lorry.server.errors import EngineUnavailable
from lorry.server.frontend.mailbox import Mailbox
from lorry.server.frontend.request import Delta, Finished, Started, Usage


def finished(index):
    return Finished(index, FinishReason.LENGTH, "", Usage(3, 0, 5), Timings())


async def drain(mailbox):
    events = []
    while True:
        try:
            events.append(await asyncio.wait_for(mailbox.get(), 60))
        except StopAsyncIteration:
            return events


async def test_unread_deltas_of_a_sequence_are_joined():
    mailbox = Mailbox(2, with_logprobs=True)
    started = Started("r", 3, 0, ())
    mailbox.put(started)
    for number in range(1000):
        mailbox.add(number % 2, chr(97 + number % 26), [number], [TokenLogprobs(number, -1.0, 1)])
    mailbox.finish(finished(0))
    mailbox.finish(finished(1))
    first, *rest = await drain(mailbox)
    assert first == started
    assert [type(event) for event in rest] == [Delta, Delta, Finished, Finished]
    for event in rest[:2]:
        assert event.token_ids == tuple(range(event.index, 1000, 2))
        assert event.text == "".join(chr(97 + number % 26) for number in event.token_ids)
        assert [entry.token_id for entry in event.logprobs] == list(event.token_ids)


async def test_no_sequence_waits_behind_another():
    mailbox = Mailbox(3, with_logprobs=False)
    for index in (0, 1, 2, 0, 0):
        mailbox.add(index, "x", [1])
    assert [(await mailbox.get()).index for _ in range(3)] == [0, 1, 2]


async def test_an_error_comes_after_what_came_before_it():
    mailbox = Mailbox(1, with_logprobs=False)
    mailbox.add(0, "half", [1])
    mailbox.fail(EngineUnavailable("gone"))
    mailbox.fail(RuntimeError("later"))
    assert (await mailbox.get()).text == "half"
    with pytest.raises(EngineUnavailable, match="gone"):
        await mailbox.get()


async def test_a_waiting_reader_is_woken_by_each_kind_of_end():
    for end, error in (("close", StopAsyncIteration), ("fail", EngineUnavailable)):
        mailbox = Mailbox(1, with_logprobs=False)
        reader = asyncio.create_task(drain(mailbox))
        await asyncio.sleep(0)
        mailbox.close() if end == "close" else mailbox.fail(EngineUnavailable("gone"))
        if error is StopAsyncIteration:
            assert await reader == []
        else:
            with pytest.raises(error):
                await reader


async def test_a_delta_without_text_still_brings_its_tokens():
    mailbox = Mailbox(1, with_logprobs=False)
    mailbox.add(0, "", [7])
    assert await mailbox.get() == Delta(0, "", (7,), None)
    mailbox.add(0, "", [])
    mailbox.finish(finished(0))
    assert await mailbox.get() == finished(0)
