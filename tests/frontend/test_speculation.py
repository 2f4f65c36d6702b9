"""What a client says of tokens proposed ahead, over what the server is set to."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lorry.server.config import EngineConfig
from lorry.server.engine.messages import Generate
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import Request, SpeculationWish, TokenPrompt
from lorry.server.frontend.speculation import resolved
from lorry.server.params import Speculation

OFF, LOOKUP = EngineConfig(), EngineConfig(speculation="prompt-lookup", draft_tokens=5)
MODEL = EngineConfig(speculation="draft-model", draft_model="small", draft_tokens=3)
ECHO = 1


@pytest.mark.parametrize(
    ("wish", "settings", "wanted"),
    [
        (SpeculationWish(), OFF, None),
        (SpeculationWish(max_draft_tokens=4), OFF, None),
        (SpeculationWish("prompt_lookup"), OFF, Speculation("prompt_lookup", 8)),
        (SpeculationWish(), LOOKUP, Speculation("prompt_lookup", 5)),
        (SpeculationWish(None, 17, False), LOOKUP, Speculation("prompt_lookup", 17, False)),
        (SpeculationWish("off"), LOOKUP, None),
        (SpeculationWish(), MODEL, Speculation("draft_model", 3)),
        (SpeculationWish("prompt_lookup"), MODEL, Speculation("prompt_lookup", 3)),
        (
            SpeculationWish("draft_model"),
            EngineConfig(speculation="prompt-lookup", draft_model="small"),
            Speculation("draft_model", 8),
        ),
    ],
)
def test_the_wish_goes_before_the_settings(
    wish: SpeculationWish, settings: EngineConfig, wanted: Speculation | None
) -> None:
    assert resolved(wish, settings) == wanted


async def test_the_engine_is_told(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(speculation="prompt-lookup", draft_tokens=5) as frontend:
        sent, send = list[Any](), frontend._engine.send
        monkeypatch.setattr(frontend._engine, "send", lambda command: (sent.append(command), send(command))[1])
        for wish in (SpeculationWish(), SpeculationWish("off")):
            async with await frontend.submit(Request(prompt=TokenPrompt((ECHO, 30)), speculation=wish)) as handle:
                assert [event async for event in handle]
        asked = [command for command in sent if isinstance(command, Generate)]
        assert [each.sampling.speculation for each in asked] == [Speculation("prompt_lookup", 5), None]
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(asked[0]), type=Generate) == asked[0]
        with pytest.raises(InvalidField, match="none; accepted: off, prompt lookup") as refused:
            await frontend.submit(Request(prompt=TokenPrompt((ECHO,)), speculation=SpeculationWish("draft_model")))
        assert refused.value.fields["field"] == "speculation.proposer"
        assert frontend.load().in_flight == 0
