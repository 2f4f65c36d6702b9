"""What a request asks of decoding, and what decoding answers about a token: structs of plain values.

A leaf: the messages between the processes carry these types and decoding reads them, so they belong to neither.
"""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


class StructuredOutput(msgspec.Struct, frozen=True):
    """The language of the answers; see `decoding/grammar.py`. kind: the field of the contract that names it."""

    kind: GrammarKind
    text: str = ""  # of a choice a JSON list, of json_object nothing
    skip_forced: bool = False


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen. The defaults switch every part off but plain sampling."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    structured_output: StructuredOutput | None = None
    seed: int = 0  # unsigned 64 bits; the frontend draws one when the client gives none
    n: int = 1


class StoppingParams(msgspec.Struct, frozen=True):
    """When a sequence ends; stop strings are the frontend's business and end in `Abort`."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    time_limit: float | None = None  # seconds from arrival; soft: what is there is the answer


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token of the vocabulary and its natural-log probability."""

    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of a token that is in the text, and the most likely ones in its place."""

    token_id: int
    logprob: float
    rank: int  # 1: it was the most likely token
    top: tuple[TokenLogprob, ...] = ()
