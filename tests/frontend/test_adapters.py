"""What the frontend believes of the engine's adapters, without an engine."""

from __future__ import annotations

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
