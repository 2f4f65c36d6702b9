"""What crosses the line between the frontend process and the engine process.

Every type here is a msgspec struct, encoded as MessagePack; nothing is pickled. The frontend sends
`Command`s, the engine answers with `EngineMessage`s, batched: one `list` of messages each way per step.
Protobuf types never reach this file; token ids, not text, are what the engine speaks.

The socket is a ZeroMQ PAIR; the frontend binds it, before it starts the engine, and the engine connects. What follows:

    engine   Loading* Ready                                        (the frontend sends nothing before Ready)
    request  Generate → Started → PromptLogprobs? → Tokens* with one `finish` for each index
             or, at any point before the last of these, Failed, and nothing more
    Abort    → Tokens with ABORTED for each index that was still live
    adapter  one AdapterReply for each command; AdapterEvent at any time
    Stats    at any time, a few a second while there is work, and once when it ends
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from lorry.server.params import Dry as Dry
from lorry.server.params import Mirostat as Mirostat
from lorry.server.params import SamplingParams as SamplingParams
from lorry.server.params import Speculation as Speculation
from lorry.server.params import StoppingParams as StoppingParams
from lorry.server.params import StructuredOutput as StructuredOutput
from lorry.server.params import TokenLogprob as TokenLogprob
from lorry.server.params import TokenLogprobs as TokenLogprobs


class FinishReason(enum.IntEnum):
    """Why a sequence ended; the values equal `lorry.v1.FinishReason`."""

    EOS = 1
    STOP = 2
    LENGTH = 3
    TIME_LIMIT = 4
    ABORTED = 5


class AdapterState(enum.IntEnum):
    """Where an adapter's bytes are; the values equal `lorry.v1.AdapterState`."""

    REGISTERED = 1
    LOADING = 2
    HOST = 3
    DEVICE = 4
    DRAINING = 5
    FAILED = 6


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One adapter of a request. In answers `revision` is always set."""

    id: str
    weight: float = 1.0
    revision: str | None = None


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Start a request of `sampling.n` sequences over one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stopping: StoppingParams
    adapters: tuple[AdapterRef, ...] = ()
    logprobs: int | None = None  # None: none; k: the chosen token and the k most likely
    entropy: bool = False  # report it with every log-probability
    prompt_logprobs_from: int | None = None  # report the log-probabilities of prompt tokens from this index on
    priority: int = 0  # higher first
    cache_salt: str = ""
    arrival: float = 0.0  # time.time() in the frontend
    deadline: float | None = None  # time.time() after which nobody waits for the answer
    prompt_end: int | None = None  # tokens of the client's prompt, where others to be scored follow; None: all


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request, or one of its sequences; unknown ids are ignored (it may just have ended)."""

    request_id: str
    index: int | None = None  # None: all


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    id: str
    path: str
    expected_revision: str | None = None
    pin: bool = False
    replace: bool = False
    fetched: str = ""  # where what `path` names, no local folder, lies by now: a folder that bears its revision's name


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    id: str


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    id: str
    pinned: bool


class GetAdapters(msgspec.Struct, frozen=True, tag=True):
    """Ask for one adapter (NOT_FOUND when unknown) or, with an empty id, for all of them in order of their ids.

    after, limit: only the first `limit` behind the id `after`; a long list at once would hold up a step.
    """

    call_id: int
    id: str = ""
    after: str = ""
    limit: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop and exit with 0."""


Command = Generate | Abort | LoadAdapter | UnloadAdapter | PinAdapter | GetAdapters | Shutdown


class ErrorInfo(msgspec.Struct, frozen=True):
    """A domain error on the wire; `kind` names a class of `lorry.server.errors`."""

    kind: str
    message: str
    fields: dict[str, str] = {}


class Timings(msgspec.Struct, frozen=True):
    """Seconds spent by one request: waiting to be scheduled, in prefill, in decoding."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class Started(msgspec.Struct, frozen=True, tag=True):
    """The request runs: its adapters are resident and its prompt has been scheduled."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    adapters: tuple[AdapterRef, ...]


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """Log-probabilities of the prompt's tokens from `Generate.prompt_logprobs_from` on, complete, sent once.

    The prompt's token 0 has none and is left out. `rank` and `top` as asked for by `Generate.logprobs`.
    """

    request_id: str
    logprobs: list[TokenLogprobs]


class Tokens(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """New tokens of one sequence; `finish` is set on its last message.

    A token that ends the sequence (end of sequence, a stop id) is among `token_ids`. Every index of the request gets
    exactly one message with `finish`, aborted ones too, unless the request ends with `Failed`.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    timings: Timings | None = None  # with `finish`
    score: float | None = None  # with `finish`, of an answer that a search has ranked


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The whole request ended with an error; nothing more of it follows."""

    request_id: str
    error: ErrorInfo


class AdapterInfo(msgspec.Struct, frozen=True):
    """What the operator sees of one adapter."""

    id: str
    revision: str
    rank: int
    target_modules: tuple[str, ...]
    state: AdapterState
    pinned: bool
    bytes: int
    in_flight: int
    methods: tuple[str, ...] = ("lora",)
    error: str = ""


class AdapterReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to the adapter command that bore `call_id`."""

    call_id: int
    adapters: list[AdapterInfo] = []
    error: ErrorInfo | None = None


class AdapterEvent(msgspec.Struct, frozen=True, tag=True):
    """An adapter changed; `removed` when it is no longer known."""

    adapter: AdapterInfo
    removed: bool = False


class Histogram(msgspec.Struct, frozen=True, array_like=True):
    """Observations of one metric since the last `Stats`."""

    name: str
    values: list[float]


class AdapterStats(msgspec.Struct, frozen=True):
    """Where adapters are and who waits for them. Tiers are "device", "host" and "disk".

    by_tier: adapters, each in the first tier that has it; bytes_by_tier: of their contents; found: adapters of requests
    by the tier that had them when the request came, host_evictions: from host memory, both since the last `Stats`
    waiting: requests for each of the adapters that most wait for; waiting_for_others: for all others together
    """

    by_tier: dict[str, int]
    bytes_by_tier: dict[str, int]
    on_device: tuple[str, ...]
    room: int  # for adapters of rank 16 on all linears, on the device
    found: dict[str, int] = {}
    host_evictions: int = 0
    waiting: dict[str, int] = {}
    waiting_for_others: int = 0


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The engine's gauges, and what its counters gained since the last one; at most a few a second."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    adapter_pages_used: int
    adapter_pages_total: int
    preemptions: int = 0
    adapter_loads: dict[str, int] = {}  # by result
    adapter_evictions: int = 0
    histograms: list[Histogram] = []
    adapters_loaded: int = 0
    adapters: AdapterStats | None = None
    grammar_rows: int = 0  # running sequences whose output is structured
    grammar_hits: int = 0  # grammars of requests that were compiled already
    drafted: dict[str, int] = {}  # tokens that were proposed, by proposer
    accepted: dict[str, int] = {}  # of these, those that were right


class ModelInfo(msgspec.Struct, frozen=True):
    """What the engine serves, measured on the loaded model."""

    name: str
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    kv_dtype: str
    adapter_dtype: str
    device: str
    bits_per_linear_weight: float
    weight_bytes: int
    kv_blocks: int
    block_size: int
    adapter_pages: int
    kernels: str  # which launchers serve: "native", "native-int16", "reference", "triton"
    max_weights_bytes: int = 0  # of an adapter's file of tensors
    base_fingerprint: str = ""  # of the quantized linears; "" where they are random
    draft_model: str = ""  # name of the model that proposes tokens; "": there is none
    tied_embeddings: bool = False  # the embedding is the head as well


class Ready(msgspec.Struct, frozen=True, tag=True):
    """First message of an engine: it is loaded and takes requests."""

    model: ModelInfo
    pid: int
    model_folder: str = ""  # where the tokenizer lies; empty: where `resolve_model` says


LoadingStage = Literal["download", "quantize", "load", "compile", "warm up"]


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress before `Ready`: how much of `stage` is done."""

    stage: LoadingStage
    done: int
    total: int


EngineMessage = Started | PromptLogprobs | Tokens | Failed | AdapterReply | AdapterEvent | Stats | Ready | Loading
