"""Wire → domain: what is said of tokens proposed ahead, and where to name a proposer makes no sense."""

from __future__ import annotations

from typing import Literal

from lorry.server.frontend.request import SpeculationWish
from lorry.server.params import MOST_DRAFT_TOKENS, Proposer
from lorry.server.rpc import fields
from lorry.server.rpc.fields import refuse
from lorry.v1 import generation_pb2

PATH = "spec.speculation"
PROPOSERS: dict[int, Proposer | Literal["off"] | None] = {
    generation_pb2.SPECULATION_PROPOSER_UNSPECIFIED: None,
    generation_pb2.SPECULATION_PROPOSER_OFF: "off",
    generation_pb2.SPECULATION_PROPOSER_PROMPT_LOOKUP: "prompt_lookup",
    generation_pb2.SPECULATION_PROPOSER_DRAFT_MODEL: "draft_model",
}


def wish(spec: generation_pb2.GenerationSpec) -> SpeculationWish:
    """Of a spec whose other fields are in their ranges; whether the server can honour it says the frontend."""
    message = spec.speculation
    if message.proposer not in PROPOSERS:
        raise refuse(f"{PATH}.proposer", message.proposer, "a SpeculationProposer")
    proposer = PROPOSERS[message.proposer]
    if proposer == "off":
        for name in ("max_draft_tokens", "adaptive"):
            if message.HasField(name):
                raise refuse(f"{PATH}.{name}", getattr(message, name), "unset with SPECULATION_PROPOSER_OFF")
    elif proposer is not None and (beside := _decided_otherwise(spec)):
        shown = generation_pb2.SpeculationProposer.Name(message.proposer)
        raise refuse(f"{PATH}.proposer", shown, f"unset, or SPECULATION_PROPOSER_OFF, with {beside}")
    most = message.max_draft_tokens if message.HasField("max_draft_tokens") else None
    if most is not None:
        fields.integer(f"{PATH}.max_draft_tokens", most, 1, MOST_DRAFT_TOKENS)
    return SpeculationWish(proposer, most, message.adaptive or not message.HasField("adaptive"))


def _decided_otherwise(spec: generation_pb2.GenerationSpec) -> str:
    """The field with which no token can be proposed, and why; "": there is none."""
    if (strategy := spec.WhichOneof("strategy")) in ("beam", "contrastive", "guidance"):
        return f"{strategy}, whose sequences are decided together"
    if spec.HasField("dola"):
        return "dola, which contrasts the layers of one token"
    if spec.sampling.HasField("mirostat"):
        return "sampling.mirostat, whose cut depends on the token before"
    if spec.structured_output.skip_forced:
        return "structured_output.skip_forced, which appends tokens itself"
    return ""
