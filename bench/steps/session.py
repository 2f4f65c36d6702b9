"""The engine that is measured: real scheduler, one step ahead, graphs, over random weights, in this process.

Texts are not computed but given: their KV blocks hold random numbers, are held for the whole run, and are made findable
under whatever adapter a request names, so that it computes one token of its prompt and then decodes.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from gpu.command import console
from gpu.measure import Stage
from steps.adapters import RandomAdapters, make_folders, revision_of
from steps.sizes import Mix, Sizes, rank_of

from lorry.adapters.canonical import page_count
from lorry.server.cache.blocks import BLOCK_SIZE, blocks_for
from lorry.server.cache.kv_cache import block_bytes
from lorry.server.cache.prefix import Namespace, Node
from lorry.server.config import GIB, EngineConfig
from lorry.server.engine.build import Types
from lorry.server.engine.graphs import GRAPH_PAGES, Bucket, block_buckets, page_bucket
from lorry.server.engine.local import Answer, LocalEngine
from lorry.server.engine.messages import AdapterRef, Command, Generate, PinAdapter, SamplingParams, StoppingParams
from lorry.server.engine.runner import Runner
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model

GUESTS = 8  # adapters of rank 16 that come and go beside the pinned ones
SPARE = 6 * GIB  # of the GPU's memory, for activations, graphs and the kernels' code
SLABS = 1.15  # the arena over its pages: each size of page has slabs of its own
FOREVER = 600.0  # seconds after which a run is taken to hang


@dataclass
class Session:
    """folder: for adapters, empty. sizes become those that fit; left_out: the batches that do not, and why."""

    stage: Stage
    sizes: Sizes
    folder: Path
    left_out: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls = itertools.count()
        self._reduced = _reduced_precision(False)  # as the engine's process does
        self.adapters = RandomAdapters()
        config = self._config()
        types = Types.choose(config)
        if self.stage.dry:
            types = replace(types, ahead=True)
        with torch.inference_mode():
            console.print(f"loading {self.sizes.model.name} with random weights")
            self.decoder = self._load(config, types)
            self.sizes = self._fitting(config, types)
            console.print("building the engine: compile, launch, measure")
            self.engine = LocalEngine(self.decoder, self._sized(config, types), types)
            self.buckets = self._buckets()
            console.print(f"recording {len(self.buckets)} graphs")
            self.record(self.buckets)
            self._texts()
        self.adapters.install()
        try:
            self._pin(self.sizes.adapters)
        except BaseException:
            self.engine.close()
            self.adapters.remove()
            raise
        gc.collect()
        gc.freeze()  # as the engine's process does

    @property
    def guests(self) -> Path:
        """Root of the adapters that are read from disk."""
        return self.folder / "guests"

    @property
    def runner(self) -> Runner:
        return self.engine.engine.runner

    def close(self) -> None:
        """Give the device's memory back."""
        self.engine.close()
        self.adapters.remove()
        _reduced_precision(self._reduced)
        del self.engine, self.decoder
        gc.unfreeze()
        gc.collect()
        if not self.stage.dry:
            torch.cuda.empty_cache()

    # ---------------------------------------------------------------- sizes

    def _config(self) -> EngineConfig:
        return EngineConfig(
            model=str(self.sizes.model),
            device=self.stage.device,
            load_format="dummy",
            dtype="float32" if self.stage.dry else "auto",
            kv_dtype="float32" if self.stage.dry else "auto",
            adapter_dtype="float32" if self.stage.dry else "auto",
            adapters_dir=str(make_folders(self.folder / "adapters", self.sizes.adapters)),
            adapter_roots=(str(make_folders(self.guests, [])),),
            cuda_graphs=False,  # recorded below, those that are replayed
        )

    def _load(self, config: EngineConfig, types: Types) -> Decoder:
        return load_model(
            config.model,
            device=types.device,
            dtype=types.dtype,
            products=types.products,
            load_format=config.load_format,
        )

    def _fitting(self, config: EngineConfig, types: Types) -> Sizes:
        """Without the batches that this GPU has no memory for."""
        sizes = self.sizes
        if types.on_gpu:
            free = torch.cuda.mem_get_info(types.device)[0] - SPARE
            while len(sizes.batches) > 1 and (needed := self._kv_bytes(sizes, types) + self._pages(sizes)) > free:
                reason = f"{needed / GIB:.0f} GiB of KV cache and adapters, {max(0, free) / GIB:.0f} GiB are free"
                self.left_out[sizes.batches[-1]] = reason
                sizes = sizes.without_largest()
        return sizes

    def _sized(self, config: EngineConfig, types: Types) -> EngineConfig:
        return replace(
            config,
            kv_memory=self._kv_bytes(self.sizes, types),
            adapter_memory=self._pages(self.sizes),
            max_running=max(*self.sizes.batches, self.sizes.streams),
            token_budget=64 if self.stage.dry else None,
        )

    def _kv_bytes(self, sizes: Sizes, types: Types) -> int:
        model = self.decoder.config
        return sizes.blocks * block_bytes(model.layers, model.kv_heads, model.head_dim, types.kv_dtype)

    def _pages(self, sizes: Sizes) -> int:
        """Bytes of an arena for all adapters and the guests."""
        return int(SLABS * (sizes.pages + GUESTS) * self.page_bytes)

    @property
    def page_bytes(self) -> int:
        """Of an adapter of rank 16 on all linears."""
        layout = self.decoder.layout
        width = (torch.float32 if self.stage.dry else torch.bfloat16).itemsize
        return layout.layers * sum(map(layout.page_elements, layout.sites)) * width

    # ---------------------------------------------------------------- graphs

    def _buckets(self) -> list[Bucket]:
        """What the batches need at their contexts, as a server records them too."""
        blocks = next(b for b in block_buckets(self._most_blocks) if b >= blocks_for(self.sizes.context))
        rows = {batch: self.sizes.mixes_of(batch) for batch in self.sizes.batches}
        rows[self.sizes.streams] = [*rows.get(self.sizes.streams, []), Mix(0), Mix(1)]
        return sorted({Bucket(n, blocks, graph_pages(mix)) for n, mixes in rows.items() for mix in mixes})

    @property
    def _most_blocks(self) -> int:
        return blocks_for(self.engine.engine.scheduler.limits.context_length)

    def record(self, buckets: list[Bucket]) -> None:
        with torch.inference_mode():
            for _ in self.runner.record(buckets):
                pass

    # ---------------------------------------------------------------- texts

    def _texts(self) -> None:
        """Random tokens and blocks of random keys and values, those of the largest batch."""
        scheduler, vocabulary = self.engine.engine.scheduler, self.decoder.config.vocab_size
        for tensor in (*self.runner.kv.keys, *self.runner.kv.values):
            for block in torch.split(tensor, 1024):
                block.copy_(torch.randn(block.shape, device=block.device))
        rows = max(*self.sizes.batches, self.sizes.streams)
        generator = torch.Generator().manual_seed(0)
        self._tokens: list[list[int]] = torch.randint(
            2, vocabulary, (rows, self.sizes.context), generator=generator
        ).tolist()
        self._blocks = [scheduler.allocator.allocate(self.sizes.text_blocks) for _ in range(rows)]

    def text(self, row: int, tokens: int, namespace: Namespace) -> list[int]:
        """A prompt, all but one of whose tokens are found in the cache; tokens: of it, whole blocks and one."""
        node: Node = namespace
        index, text = self.engine.engine.scheduler.index, self._tokens[row]
        for number, start in enumerate(range(0, tokens - BLOCK_SIZE, BLOCK_SIZE)):
            node = index.insert(node, text[start : start + BLOCK_SIZE], self._blocks[row][number])
        return text[:tokens]

    def start_of(self, steps: int) -> int:
        """Tokens of a prompt that, after so many steps, has come to the context; whole blocks and one."""
        return (self.sizes.context - steps) // BLOCK_SIZE * BLOCK_SIZE + 1

    # ---------------------------------------------------------------- requests

    def requests(
        self,
        rows: int | range,
        adapter: Callable[[int], str | None],
        new_tokens: int,
        *,
        steps: int | None = None,
        logprobs: int | None = None,
    ) -> list[Generate]:
        """Greedy, of exactly `new_tokens`; steps: that the prompt leaves room for, where these are more."""
        found = []
        for row in range(rows) if isinstance(rows, int) else rows:
            name = adapter(row)
            refs = () if name is None else (AdapterRef(name),)
            namespace = Namespace(tuple((ref.id, revision_of(ref.id), ref.weight) for ref in refs))
            prompt = self.text(row, self.start_of(steps or new_tokens), namespace)
            found.append(self.request(prompt, new_tokens, refs, logprobs))
        return found

    def request(
        self, prompt: list[int], new_tokens: int, refs: tuple[AdapterRef, ...] = (), logprobs: int | None = None
    ) -> Generate:
        stopping = StoppingParams(new_tokens, ignore_eos=True)
        return Generate(f"r{next(self._calls)}", prompt, SamplingParams(temperature=0.0), stopping, refs, logprobs)

    def generate(self, requests: list[Generate]) -> list[Answer]:
        """Answers of requests, run together to their end."""
        self.engine.run(*requests, timeout=FOREVER)
        return self.taken(requests)

    def taken(self, requests: list[Generate]) -> list[Answer]:
        """Answers that are there, which the engine forgets; raises the error of one that has failed."""
        answers = [self.engine.answers.pop(request.request_id) for request in requests]
        self.engine.messages.clear()
        for request, answer in zip(requests, answers, strict=True):
            if answer.error is not None:
                raise answer.error
            assert len(answer.tokens()) == request.stopping.max_new_tokens
        return answers

    def _pin(self, adapters: list[str]) -> None:
        calls = [next(self._calls) for _ in adapters]
        pins: list[Command] = [PinAdapter(call, name, True) for call, name in zip(calls, adapters, strict=True)]
        self.engine.run(*pins, timeout=FOREVER)
        for call in calls:
            if (error := self.engine.replies.pop(call).error) is not None:
                raise RuntimeError(error.message)

    # ---------------------------------------------------------------- bytes

    def bytes_of(self, rows: int, mix: Mix, tokens: float) -> float:
        """What a step must read: weights and head, the pages of its adapters once, keys and values of `rows` sequences
        of `tokens` tokens. Embeddings, activations and logits are not counted."""
        model, kv = self.decoder.config, self.runner.kv
        pages = sum(page_count(rank_of(name)) for name in mix.adapters()) * self.page_bytes
        each = block_bytes(model.layers, model.kv_heads, model.head_dim, kv.dtype) / BLOCK_SIZE
        return self.decoder.step_bytes + pages + rows * tokens * each


def _reduced_precision(allowed: bool) -> bool:
    """Whether cuBLAS may keep parts of a sum in bfloat16; what was set before."""
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
    return bool(before)


def graph_pages(mix: Mix) -> int:
    """Pages of the bucket that serves the mix."""
    if not mix.count:
        return 0
    needed = page_bucket(max(page_count(rank) for rank in mix.ranks))
    return next(pages for pages in GRAPH_PAGES if pages >= needed)


def adapters_of(mix: Mix) -> Callable[[int], str | None]:
    return partial(Mix.adapter, mix)
