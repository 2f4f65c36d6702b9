"""From a loaded decoder and the configuration to an engine that is ready to run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import PAGE_DTYPES
from lorry.adapters.manager import AdapterManager
from lorry.adapters.reading.tensor_file import MAX_HEADER_BYTES
from lorry.adapters.segments import build_segments
from lorry.kernels import native
from lorry.kernels.nf4_linear import Products
from lorry.server.cache.block_table import BlockTable
from lorry.server.cache.blocks import BLOCK_SIZE, BlockAllocator
from lorry.server.cache.kv_cache import KVCache, block_bytes, choose_num_blocks
from lorry.server.cache.prefix import PrefixIndex
from lorry.server.config import GIB, MIB, EngineConfig
from lorry.server.decoding.forced import SkipForced
from lorry.server.decoding.grammar import Grammar
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.speculation.strategy import Speculating
from lorry.server.decoding.strategies import Strategies
from lorry.server.engine.adapters import AdapterDesk
from lorry.server.engine.batch import build_batch
from lorry.server.engine.channel import Channel
from lorry.server.engine.draft_model import DraftModel
from lorry.server.engine.drafter import Drafter
from lorry.server.engine.grammars import GrammarDesk
from lorry.server.engine.graphs import GRAPH_PAGES, MOST_ADAPTERS, PAGE_BUCKETS
from lorry.server.engine.loop import Engine
from lorry.server.engine.messages import Generate, ModelInfo, SamplingParams, StoppingParams
from lorry.server.engine.plan import Piece
from lorry.server.engine.runner import SCORED_ROWS, Runner
from lorry.server.engine.scheduler import Limits, Scheduler
from lorry.server.engine.sequence import Request, Sequence
from lorry.server.engine.start.gpu_start import GpuStart, Progress
from lorry.server.engine.start.memory import CudaMemory, free_memory
from lorry.server.engine.start.memory_plan import memory_line
from lorry.server.engine.start.rehearsal import Rehearsal
from lorry.server.errors import InvalidField, LorryError
from lorry.server.grammars.library import Library
from lorry.server.grammars.vocabulary import load_vocabulary
from lorry.server.model.base_weights import DecoderWeights
from lorry.server.model.decoder import Decoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Types:
    """Where and in which types the engine computes and stores."""

    device: torch.device
    dtype: torch.dtype
    products: Products
    kv_dtype: torch.dtype
    adapter_dtype: torch.dtype
    ahead: bool
    """Drive the device as a GPU wants it: the next step planned while one runs, inputs staged, decoding recorded."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @classmethod
    def choose(cls, config: EngineConfig) -> Types:
        """Resolve every "auto": CUDA where there is one; on the CPU activations in float32 with products of 16-bit
        integers, whose error is far below that of a KV cache in bfloat16; the rest in bfloat16.

        Raises InvalidField for a device that is not there.
        """
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cpu", "cuda"):
            raise InvalidField(f"device is {name!r}, auto, cpu or cuda is expected", field="device")
        if name == "cuda" and not torch.cuda.is_available():
            raise InvalidField("device is cuda, but this machine has none that torch can use", field="device")
        device = torch.device(name)
        computing = torch.float32 if device.type == "cpu" else torch.bfloat16
        return cls(
            device,
            _dtype(config.dtype, computing),
            "int16" if config.dtype == "auto" and device.type == "cpu" else "float32",
            _dtype(config.kv_dtype, torch.bfloat16),
            PAGE_DTYPES[config.adapter_dtype],
            device.type == "cuda",
        )


def _dtype(name: str, auto: torch.dtype) -> torch.dtype:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": torch.float8_e4m3fn}
    return auto if name == "auto" else named[name]


def adapter_memory(config: EngineConfig, types: Types) -> int:
    """Bytes for rank pages."""
    return config.adapter_memory or (2 * GIB if types.on_gpu else 256 * MIB)


def adapter_host_memory(config: EngineConfig, types: Types) -> int:
    """Bytes for checked adapters in host memory."""
    return 2 * adapter_memory(config, types) if config.adapter_host_memory is None else config.adapter_host_memory


def token_budget(config: EngineConfig, types: Types) -> int:
    """Tokens of a step."""
    return config.token_budget or (2048 if types.on_gpu else 256)


def build_engine(
    config: EngineConfig,
    types: Types,
    decoder: Decoder,
    channel: Channel,
    progress: Progress = lambda *_: None,
    grammars: GrammarDesk | None = None,
    draft: Decoder | None = None,
) -> Engine:
    """Allocate the adapters' pages, then the KV cache from what is left, and put the parts together.

    draft: a draft model; raises InvalidField if it has another vocabulary.

    On a GPU also compile, launch and record what steps will launch; progress(stage, done, of how much) is told of it.
    """
    model = decoder.config
    grammars = grammars or GrammarDesk(None)
    processors, grammar = Processors(), Grammar(grammars.library, model.vocab_size)
    processors.append(grammar)
    speculating = Speculating(Strategies(processors), grammar)
    strategy = SkipForced(speculating, grammar)
    if draft is not None and draft.config.vocab_size != model.vocab_size:
        raise InvalidField(
            f"the draft model has {draft.config.vocab_size} tokens, the model {model.vocab_size}: a draft model of the"
            " same vocabulary is expected",
            field="draft_model",
        )
    limits = Limits(config.max_running, token_budget(config, types), model.context_length)
    start = GpuStart(config, limits, CudaMemory(types.device), progress) if types.on_gpu else None
    if start is not None:
        start.check_adapters(adapter_memory(config, types))
    layout = replace(
        decoder.layout,
        base=Path(config.model).name,
        fingerprint=decoder.fingerprint,
        allow_base_mismatch=config.allow_base_mismatch,
    )
    pool = PagePool(layout, adapter_memory(config, types), types.adapter_dtype, types.device)
    roots = tuple(Path(root) for root in config.adapter_roots)
    folder = None if config.adapters_dir is None else Path(config.adapters_dir)
    host_memory = adapter_host_memory(config, types)
    desk = AdapterDesk(AdapterManager(Catalog(folder, roots), pool, DecoderWeights(decoder), host_memory))

    bytes_per_block = block_bytes(model.layers, model.kv_heads, model.head_dim, types.kv_dtype)
    if draft is not None:
        small = draft.config
        bytes_per_block += block_bytes(small.layers, small.kv_heads, small.head_dim, types.kv_dtype)
    if start is None:
        num_blocks = choose_num_blocks(
            bytes_per_block, config.kv_memory, free_memory(types.device), config.max_running, model.context_length
        )
    else:
        rehearsal = Rehearsal(
            decoder,
            pool.pages,
            strategy,
            limits,
            types.kv_dtype,
            adapters=MOST_ADAPTERS,
            pages=PAGE_BUCKETS[-1],
            graph_pages=GRAPH_PAGES[-1],
            logits_rows=SCORED_ROWS,
        )
        num_blocks = start.blocks(rehearsal, bytes_per_block)
    kv = KVCache(model.layers, model.kv_heads, model.head_dim, num_blocks, types.kv_dtype, types.device)
    context_length = min(model.context_length, num_blocks * BLOCK_SIZE)
    if context_length < model.context_length:
        log.warning("the KV cache holds %d tokens, less than the context of %d", context_length, model.context_length)
        limits = replace(limits, context_length=context_length)
    allocator = BlockAllocator(num_blocks)
    scheduler = Scheduler(limits, allocator, PrefixIndex(allocator), desk)
    runner = Runner(decoder, kv, pool.pages, types.ahead, config.max_running)
    if start is not None:
        start.record(runner, limits)
    draft_model = None
    if draft is not None:
        small = draft.config
        draft_kv = KVCache(small.layers, small.kv_heads, small.head_dim, num_blocks, types.kv_dtype, types.device)
        draft_runner = Runner(draft, draft_kv, None, types.ahead, config.max_running)
        draft_model = DraftModel(draft_runner, speculating, limits.token_budget)
    line = memory_line(
        weights=decoder.weight_bytes,
        adapters=pool.capacity_bytes,
        pages=pool.pages_total,
        activations=0 if start is None else start.activations,
        graphs=0 if start is None else start.graphs,
        kv=kv.nbytes,
        blocks=num_blocks,
        free=max(0, free_memory(types.device) - (kv.nbytes if start is None else 0)),  # a CPU gives it when it is used
    )
    log.info("%s", line)
    return Engine(
        channel,
        scheduler,
        runner,
        strategy,
        desk,
        model.eos_token_ids,
        grammars=grammars,
        drafter=Drafter(scheduler, speculating, draft_model),
        ahead=types.ahead,
        debug_checks=config.debug_checks,
    )


def grammar_desk(folder: Path, decoder: Decoder) -> GrammarDesk:
    """The desk of a model whose files lie in `folder`; one that refuses all grammars where they serve none."""
    model = decoder.config
    try:
        return GrammarDesk(Library(load_vocabulary(folder, model.vocab_size, model.eos_token_ids)))
    except LorryError as error:
        return GrammarDesk(None, error)


def warm_up(engine: Engine) -> None:
    """Run one prompt of a few blocks and one single token, so that the first request finds everything compiled."""
    limit = min(3 * BLOCK_SIZE, engine.scheduler.limits.context_length)
    for length in (limit, 1):
        message = Generate("", [0] * length, SamplingParams(), StoppingParams(1))
        sequence = Sequence(Request(message, 0), 0, BlockTable(engine.scheduler.allocator))
        sequence.table.prepare(0, length)
        engine.runner.forward(build_batch([Piece(sequence, 0, length)], [], build_segments))
        sequence.table.release()


def describe(config: EngineConfig, types: Types, engine: Engine) -> ModelInfo:
    """What is served, measured on the loaded model; never a host path."""
    decoder, kv = engine.runner.decoder, engine.runner.kv
    model = decoder.config
    return ModelInfo(
        name=Path(config.model).name,
        architecture=model.architecture,
        parameters=decoder.parameters,
        layers=model.layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context_length=engine.scheduler.limits.context_length,
        eos_token_ids=model.eos_token_ids,
        dtype=_name(types.dtype),
        kv_dtype=_name(types.kv_dtype),
        adapter_dtype=_name(types.adapter_dtype),
        device=types.device.type,
        bits_per_linear_weight=decoder.bits_per_linear_weight,
        weight_bytes=decoder.weight_bytes,
        kv_blocks=kv.num_blocks,
        block_size=BLOCK_SIZE,
        adapter_pages=engine.adapters.manager.pool.pages_total,
        kernels=_kernels(types),
        max_weights_bytes=decoder.layout.max_weight_bytes() + MAX_HEADER_BYTES,
        base_fingerprint=decoder.fingerprint,
        draft_model="" if config.draft_model is None else Path(config.draft_model).name,
        tied_embeddings=decoder.tied_embeddings,
    )


def _kernels(types: Types) -> str:
    if types.device.type != "cpu":
        return "triton"
    if native.library() is None:
        return "reference"
    return "native-int16" if types.products == "int16" else "native"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
