"""What a client asks for and what it is told, in the domain's own words: no protobuf, no engine internals.

`rpc/convert.py` builds `Request`s and renders `Event`s; the engine's share of a request (token ids, sampling)
is built from here by `frontend/prepare.py`.
"""

from __future__ import annotations

import enum
import secrets
import time
from dataclasses import dataclass, field
from typing import Literal

from lorry.server.engine.messages import AdapterRef, FinishReason, SamplingParams, Timings, TokenLogprobs
from lorry.server.params import Proposer


def fresh_seed() -> int:
    """64 random bits, for requests that bring no seed."""
    return secrets.randbits(64)


def fresh_request_id() -> str:
    """A request id that no client is likely to choose."""
    return f"req-{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; the model's special tokens are added, unless a caller of tokenize says otherwise."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered through the model's own chat template."""

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class SamplingTexts:
    """Text among the sampling parameters; its tokens join those of `Request.sampling` (`sampling_texts.py`)."""

    bad_words: tuple[tuple[str, str], ...] = ()
    """Each with the field that it came in."""
    sequence_breakers: tuple[str, ...] = ()
    """Of DRY; none: the usual ones, where the model has a tokenizer."""


@dataclass(frozen=True, slots=True)
class StoppingCriteria:
    """When a sequence ends; the first that applies ends it."""

    max_new_tokens: int | None = None
    """None: as many as the context still holds."""
    min_new_tokens: int = 0
    """Neither end-of-sequence, stop tokens nor stop strings count before this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the sequence where they first appear."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    time_limit: float | None = None
    """Seconds from arrival; soft: what is there is the answer."""


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """What the answer holds beside the generated text."""

    logprobs: int | None = None
    """None: none; k: the generated token's and the k most likely ones'."""
    prompt_logprobs: bool = False
    """Log-probabilities of the prompt's tokens, from the second one on."""
    include_prompt: bool = False
    """The text of each sequence begins with the prompt's text."""
    include_stop: bool = False
    """The text ends with the stop string that ended it."""
    entropy: bool = False
    """The entropy of the distribution with each log-probability."""


class Ranking(enum.IntEnum):
    """What candidates are ranked by; the values equal `lorry.v1.BestOfRanking`."""

    MEAN = 1
    SUM = 2


@dataclass(frozen=True, slots=True)
class BestOf:
    """Sample `candidates` sequences and keep the `sampling.n` best ones."""

    candidates: int
    ranking: Ranking = Ranking.MEAN


@dataclass(frozen=True, slots=True)
class SpeculationWish:
    """What a client says of tokens proposed ahead; `frontend/speculation.py` fills in what it leaves to the server."""

    proposer: Proposer | Literal["off"] | None = None
    """None: the server's default."""
    max_draft_tokens: int | None = None
    """None: the server's default."""
    adaptive: bool = True
    """Fewer are proposed, or none, while more do not pay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation request; ranges that need no model have been checked by whoever built it."""

    prompt: Prompt
    adapters: tuple[AdapterRef, ...] = ()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(seed=fresh_seed()))
    """`seed` is always set; draw it with `fresh_seed` when the client gives none."""
    texts: SamplingTexts = SamplingTexts()
    stopping: StoppingCriteria = StoppingCriteria()
    response: ResponseOptions = ResponseOptions()
    best_of: BestOf | None = None
    negative: Prompt | None = None
    """Of a guidance among `sampling`, whose tokens are still to be filled in."""
    speculation: SpeculationWish = SpeculationWish()
    priority: int = 0
    """Higher first."""
    cache_salt: str = ""
    request_id: str = field(default_factory=fresh_request_id)
    arrival: float = field(default_factory=time.time)
    """time.time() at which the call came in."""
    deadline: float | None = None
    """time.time() after which nobody waits for the answer."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one sequence; `completion_tokens` ends with the token that completed a stop."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """The request has been scheduled; first event, once."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    adapters: tuple[AdapterRef, ...]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """One for each token of the prompt but the first; after Started, once, when asked for."""

    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sequence gained: whole characters, and new tokens whose text may follow later."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of `token_ids`, when asked for."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One sequence has ended; its last event."""

    index: int
    reason: FinishReason
    stop: str
    """The stop string that ended it, or ""."""
    usage: Usage
    timings: Timings
    score: float | None = None
    """What it was ranked by, where sequences were."""


Event = Started | PromptLogprobs | Delta | Finished


@dataclass(frozen=True, slots=True)
class Score:
    """One value for each token of the continuation."""

    logprobs: tuple[float, ...]
    greedy_token_ids: tuple[int, ...]
    entropies: tuple[float, ...] = ()
    """In nats; none unless asked for."""
