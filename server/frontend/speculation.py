"""Whether a request speculates, and with what: the client's wish over the server's settings."""

from __future__ import annotations

from lorry.server.config import EngineConfig
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import SpeculationWish
from lorry.server.params import Proposer, Speculation

DEFAULTS: dict[str, Proposer] = {"prompt-lookup": "prompt_lookup", "draft-model": "draft_model"}


def resolved(wish: SpeculationWish, settings: EngineConfig) -> Speculation | None:
    """What the engine is told; None: nothing is proposed. Raises InvalidField for a draft model that is not there.

    Where the strategy does not speculate the engine passes it by, see `SamplingParams.speculates`.
    """
    proposer = DEFAULTS.get(settings.speculation) if wish.proposer is None else wish.proposer
    if proposer is None or proposer == "off":
        return None
    if proposer == "draft_model" and settings.draft_model is None:
        raise InvalidField(
            "speculation.proposer is the draft model, of which this server has none; accepted: off, prompt lookup",
            field="speculation.proposer",
        )
    return Speculation(proposer, wish.max_draft_tokens or settings.draft_tokens, wish.adaptive)
