"""What a request asks of decoding, and what decoding answers about a token: structs of plain values.

A leaf: the messages between the processes carry these types and decoding reads them, so they belong to neither.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
Proposer = Literal["prompt_lookup", "draft_model"]

MOST_DRAFT_TOKENS = 32


class StructuredOutput(msgspec.Struct, frozen=True):
    """The language of the answers; see `decoding/grammar.py`. kind: the field of the contract that names it."""

    kind: GrammarKind
    text: str = ""  # of a choice a JSON list, of json_object nothing
    skip_forced: bool = False


class Mirostat(msgspec.Struct, frozen=True):
    """A threshold on surprise that a sequence moves by itself; see `decoding/mirostat.py`."""

    tau: float = 5.0  # bits
    eta: float = 0.1


class Dry(msgspec.Struct, frozen=True):
    """A penalty on what would lengthen a repetition; see `decoding/dry.py`."""

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    sequence_breakers: tuple[int, ...] = ()  # token ids
    range: int = 0  # how many of the newest tokens are looked at; 0: all


class EarlyStopping(enum.IntEnum):
    """When a beam search ends, once it holds `width` finished answers; the values equal `lorry.v1.EarlyStopping`."""

    HEURISTIC = 1  # when the best unfinished one, at its present length, scores no better than the worst of them
    FIRST = 2  # at once
    NEVER = 3  # when no unfinished one can score better, whatever its length will be


class BeamSearch(msgspec.Struct, frozen=True, tag="beam"):
    """Search for the most likely answers; see `lorry.server.decoding.beam`."""

    width: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    groups: int = 1
    diversity_penalty: float = 0.0

    @property
    def rows(self) -> tuple[str, int]:
        """The most sequences at once, and the field that says so."""
        return "beam.width", self.width

    @property
    def observes(self) -> bool:
        """Whether the hidden states of the prompt are wanted."""
        return False

    def diverging(self, tokens: int) -> int:
        """By how many tokens at their ends two sequences of `tokens` new tokens may differ."""
        return tokens


class ContrastiveSearch(msgspec.Struct, frozen=True, tag="contrastive"):
    """Weigh likely tokens against repetition; see `lorry.server.decoding.contrastive`."""

    top_k: int
    penalty_alpha: float

    @property
    def rows(self) -> tuple[str, int]:
        """The most sequences at once, and the field that says so."""
        return "contrastive.top_k", self.top_k

    @property
    def observes(self) -> bool:
        """Whether the hidden states of the prompt are wanted."""
        return True

    def diverging(self, tokens: int) -> int:
        """By how many tokens at their ends two sequences of `tokens` new tokens may differ."""
        return min(1, tokens)


class Guidance(msgspec.Struct, frozen=True, tag="guidance"):
    """Move the answer away from another distribution; see `lorry.server.decoding.guidance`."""

    scale: float
    negative: tuple[int, ...] | None = None  # token ids of the negative prompt; None: the prompt, without adapters

    @property
    def rows(self) -> tuple[str, int]:
        """The most sequences at once, and the field that says so."""
        return "guidance", 2

    @property
    def observes(self) -> bool:
        """Whether the hidden states of the prompt are wanted."""
        return False


Search = BeamSearch | ContrastiveSearch | Guidance


class DoLa(msgspec.Struct, frozen=True):
    """Contrast the last layer with an earlier one; see `decoding/dola.py`."""

    layers: tuple[int, ...] = ()  # the candidates, rising; 0: the embedding
    bucket: Literal["low", "high"] | None = None  # a part of the model in their place; the frontend says which they are


class Speculation(msgspec.Struct, frozen=True):
    """Tokens proposed ahead and checked together; see `decoding/speculation/`."""

    proposer: Proposer
    max_draft_tokens: int = 8  # 1 to MOST_DRAFT_TOKENS
    adaptive: bool = True  # fewer or none while they do not pay


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen. The defaults switch every part off but plain sampling."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_n_sigma: float = 0.0  # 0: off
    mirostat: Mirostat | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    dry: Dry | None = None
    no_repeat_ngram_size: int = 0  # 0: off
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids each
    allowed_token_ids: tuple[int, ...] = ()  # (): all
    structured_output: StructuredOutput | None = None
    seed: int = 0  # unsigned 64 bits; the frontend draws one when the client gives none
    n: int = 1
    dola: DoLa | None = None
    search: Search | None = None  # its sequences are decided together; but for guidance, in place of sampling
    speculation: Speculation | None = None  # changes no token

    @property
    def speculates(self) -> bool:
        """Whether tokens are proposed: not where rows are decided together, where layers are contrasted, where a cut
        depends on the token before, nor where forced tokens are appended without being run."""
        drawn_apart = self.search is None and self.dola is None and (self.mirostat is None or self.temperature == 0.0)
        skips = self.structured_output is not None and self.structured_output.skip_forced
        return self.speculation is not None and drawn_apart and not skips


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
    entropy: float | None = None  # of the distribution, in nats; where it was asked for
