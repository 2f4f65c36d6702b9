"""Configuration: frozen dataclasses that are handed down; nothing here reads the environment.

`EngineConfig` crosses to the engine process as JSON through msgspec (`to_json`, `engine_config_from_json`),
so its fields are plain JSON types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from lorry.server.errors import InvalidField
from lorry.server.params import MOST_DRAFT_TOKENS

GIB = 1 << 30
MIB = 1 << 20

DEFAULT_MODEL = "smollm2-135m-instruct"

DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
KVDtypeChoice = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
AdapterDtypeChoice = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
LoadFormat = Literal["auto", "dummy"]
SpeculationChoice = Literal["off", "prompt-lookup", "draft-model"]
LogFormat = Literal["lines", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine process needs to know; every field is optional."""

    model: str = DEFAULT_MODEL
    """The default's name, a model folder, a .gguf file, or a hub id where a hub is reachable."""
    device: str = "auto"
    """Where the model computes: "auto", "cpu" or "cuda"."""
    load_format: LoadFormat = "auto"
    """auto: what the model's files hold; dummy: random NF4 weights of the shape in its config.json, to measure speed
    with nothing to download."""
    dtype: DtypeChoice = "auto"
    """Type of the activations; auto: bfloat16 on CUDA, on the CPU float32, rounded to 16-bit integers where they meet
    NF4 weights; float32, said by name, is not rounded."""
    kv_dtype: KVDtypeChoice = "auto"
    """Type of the key and value cache; auto: bfloat16; fp8: e4m3, twice the tokens in the same memory, far less
    exact (docs/performance.md)."""
    adapter_dtype: AdapterDtypeChoice = "auto"
    """Type of the adapters' rank pages; auto: bfloat16; int8, fp8 (e4m3): a scale for each rank, twice the adapters in
    the same memory, less exact (docs/performance.md)."""
    kv_memory: int | None = None
    """Bytes for the key and value cache; None: on a GPU what is left of its share, on a CPU three tenths of what is
    free."""
    adapter_memory: int | None = None
    """Bytes for the adapters' rank pages; None: 2 GiB on a GPU, which takes as much host memory again, 256 MiB on a
    CPU."""
    adapter_host_memory: int | None = None
    """Bytes of host memory for checked adapters, which come back without a read from disk: copies of those on the
    device, which a GPU's always have, and those asked for last of the others; None: twice `adapter_memory`."""
    gpu_memory_fraction: float = 0.9
    """Share of the GPU's memory that weights, adapters, activations and the key and value cache take together."""
    adapters_dir: str | None = None
    """Folder whose sub-folders are adapters under their own names; None: none are registered at start."""
    adapter_roots: tuple[str, ...] = ()
    """Folders below which LoadAdapter may find adapters; `adapters_dir` is always one of them."""
    adapter_sources: tuple[str, ...] = ()
    """Prefixes below which LoadAdapter may fetch adapters: hf://, s3://, gs:// or https:// with an organisation, bucket
    or host, and what follows it; none: nothing is fetched (docs/sources.md)."""
    adapter_cache_size: int | None = None
    """Most bytes on disk for fetched adapters; those used longest ago go first, none that a server has loaded or that
    was used in the last ten minutes; None: any number (docs/sources.md)."""
    allow_base_mismatch: bool = False
    """Serve adapters that name another base's fingerprint, with a warning; off: they are refused."""
    max_running: int = 64
    """Most sequences in one batch."""
    max_waiting: int = 1024
    """Most requests that may wait for their first token; the frontend refuses one more."""
    token_budget: int | None = None
    """Most tokens of one step, prompts' chunks and decoded tokens together; None: 2048 on a GPU, 256 on a CPU."""
    context_length: int | None = None
    """Most tokens of prompt and answer together; None: what the model was trained for."""
    speculation: SpeculationChoice = "off"
    """What proposes tokens ahead where a request does not say: prompt-lookup continues repetitions of the text,
    draft-model asks a smaller model; answers are the same (docs/decoding-speculation.md)."""
    draft_model: str | None = None
    """A smaller model of the same vocabulary, named like the model itself, that requests may have propose tokens; None:
    none."""
    draft_tokens: int = 8
    """Most tokens proposed at once where a request does not say; 1 to 32."""
    cuda_graphs: bool = True
    """Replay recorded launches when only decoding on a GPU; off: launch each kernel, to debug."""
    threads: int | None = None
    """Threads that compute on the CPU; None: one for each physical core."""
    seed: int = 0
    """Seed of whatever is random in the engine beside the requests, which bring their own."""
    debug_checks: bool = False
    """Prove the allocators' invariants whenever the engine is idle."""

    def __post_init__(self) -> None:
        """Raises InvalidField for settings of speculation that exclude each other or lie out of range."""
        if not 1 <= self.draft_tokens <= MOST_DRAFT_TOKENS:
            raise InvalidField(
                f"draft_tokens is {self.draft_tokens}, 1 to {MOST_DRAFT_TOKENS} is expected", field="draft_tokens"
            )
        if self.draft_model == "":
            raise InvalidField("draft_model is empty, a model or none is expected", field="draft_model")
        if self.speculation == "draft-model" and self.draft_model is None:
            raise InvalidField("speculation is draft-model, but draft_model names none", field="speculation")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What `lorry serve` needs to know; `engine` is handed on to the engine process."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engine's part."""
    host: str = "127.0.0.1"
    """Address that gRPC and the metrics page listen on."""
    port: int = 50051
    """TCP port of gRPC; 0: any free one, printed when serving."""
    metrics_port: int | None = None
    """TCP port of the Prometheus page; 0: any free one; None: no page."""
    drain_timeout: float = 30.0
    """Seconds that streams may go on after SIGTERM."""
    max_message_bytes: int = 4 * MIB
    """Largest gRPC message that is taken or sent."""
    log_format: LogFormat = "lines"
    """Logs as lines for people or as one JSON object a line."""
    log_level: LogLevel = "info"
    """Least level that is logged."""
    restart_backoff: float = 0.5
    """Seconds before a dead engine is started again; doubles with each death in a row."""
    restart_backoff_max: float = 30.0
    """Most seconds between two starts of the engine."""


def to_json(config: EngineConfig) -> bytes:
    """One JSON object with every field of `config`."""
    return msgspec.json.encode(config)


def engine_config_from_json(data: bytes | str) -> EngineConfig:
    """The inverse of `to_json`; raises msgspec.ValidationError or InvalidField that name a bad field."""
    return msgspec.json.decode(data, type=EngineConfig)
