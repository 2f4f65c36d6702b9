"""What the frontend believes of the engine's adapters, without an engine."""

from __future__ import annotations

import asyncio

from lorry.server.engine.messages import AdapterEvent, AdapterInfo, AdapterReply, AdapterState
from lorry.server.frontend.adapters import EngineAdapters
from lorry.server.frontend.interface import ChangeKind


def info(id):
    return AdapterInfo(id, f"revision of {id}", 5, ("q_proj",), AdapterState.DEVICE, False, 7, 0)


async def test_a_change_in_the_batch_of_a_new_engines_list_is_kept():
    sent = []
    adapters = EngineAdapters(sent.append, lambda: None)
    adapters.engine_up()
    (listing,) = sent
    adapters.replied(AdapterReply(listing.call_id, [info("a")]))
    adapters.changed(AdapterEvent(info("b")))
    watch = adapters.watch()
    seen = [await anext(watch), await anext(watch)]
    assert [(change.kind, change.adapter.id) for change in seen] == [
        (ChangeKind.PRESENT, "a"),
        (ChangeKind.PRESENT, "b"),
    ]
    await watch.aclose()


async def test_a_long_list_is_asked_for_in_parts():
    known = [info(f"{number:04d}") for number in range(1000)]
    parts = []

    def send(command):
        found = [each for each in known if each.id > command.after][: command.limit]
        parts.append(len(found))
        asyncio.get_running_loop().call_soon(adapters.replied, AdapterReply(command.call_id, found))

    adapters = EngineAdapters(send, lambda: None)
    assert await adapters.list() == known
    assert max(parts) <= 128 and len(parts) == 8
    assert await adapters.list("0003", 200) == known[4:204]
    assert await adapters.list("0998", 5) == known[999:]
    assert await adapters.list("0999") == []
