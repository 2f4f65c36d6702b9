"""What a GPU does before the KV cache is made: every kernel is compiled and launched once, and the largest steps are
measured, since the cache gets what they leave.

Steps run on a cache of one block, which they do not write, and name no adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorry.adapters.segments import rows_of
from lorry.kernels.lora import AdapterPages
from lorry.server.cache.kv_cache import KVCache
from lorry.server.decoding.interface import Row, Strategy
from lorry.server.engine.scheduler import Limits
from lorry.server.engine.start.memory import DeviceMemory
from lorry.server.engine.start.warm_up import Shape, decode_step, inputs_of, largest_step, table_width, warm_up_shapes
from lorry.server.model.decoder import Decoder
from lorry.server.params import SamplingParams, StoppingParams

Progress = Callable[[str, int, int], None]

SAMPLING = (  # the first launches whatever any of them does
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={0: 1.0}),
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.01),
)
LOGPROBS = 20  # most that a request may ask for, see rpc


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes that the largest step takes beside weights, adapters and caches, and a step that only decodes."""

    step: int
    decode: int


class Rehearsal:
    """strategy: that of the engine; adapters: most of a combo; pages: most that these have in one linear, and in a
    step that is a graph; logits_rows: most rows of prompts whose logits are computed at once."""

    def __init__(
        self,
        decoder: Decoder,
        tables: AdapterPages,
        strategy: Strategy,
        limits: Limits,
        kv_dtype: torch.dtype,
        *,
        adapters: int,
        pages: int,
        graph_pages: int,
        logits_rows: int,
    ) -> None:
        model = decoder.config
        self._decoder = decoder
        self._tables = tables
        self._strategy = strategy
        self._limits = limits
        self._logits_rows = max(logits_rows, limits.max_running)
        self._largest = largest_step(limits, adapters, pages)
        self._decode = decode_step(limits.max_running, adapters, graph_pages)
        self._kv = KVCache(model.layers, model.kv_heads, model.head_dim, 1, kv_dtype, decoder.device)

    @torch.inference_mode()
    def forward(self, shape: Shape) -> torch.Tensor:
        """The launches of a step up to its logits, float32 [R, V], of as many rows as there may be."""
        inputs = inputs_of(shape, table_width(self._limits), self._decoder.device)
        hidden = self._decoder.forward(inputs, self._kv, self._tables).index_select(0, inputs.logits_rows)
        segments, rows = inputs.logits_segments, min(len(hidden), self._logits_rows)
        own = None if segments is None else rows_of(segments, 0, rows)
        return self._decoder.logits(hidden[:rows], None, own, self._tables)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, read: bool = True) -> None:
        """Choose the next token of each row, the kinds of requests in turn, all of which want log-probabilities.

        read: else none wants them, and nobody looks at what is chosen.
        """
        logprobs = min(LOGPROBS, logits.shape[1]) if read else None
        rows = [_row(number, logprobs) for number in range(min(len(logits), self._limits.max_running))]
        logits = logits[: len(rows)]
        if all(map(self._strategy.can_begin, rows)):
            last = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
            pending = self._strategy.begin(rows, logits, [0] * len(rows), last)
            if read:
                pending.continuations()
        elif read:
            self._strategy.decide(rows, logits)
        for row in rows:
            self._strategy.release(row.key)

    def compile(self, threads: int, progress: Progress) -> None:
        """Compile what the warm-up launches, several kernels at a time; what is kept from an earlier start is read."""
        from lorry.kernels.triton.compilations import compile_noted, noted

        with noted() as wanted:
            self.launch_all()
        compile_noted(wanted, threads, lambda done, total: progress("compile", done, total))

    def launch_all(self) -> None:
        """Every launch of the warm-up, whose results nobody uses."""
        for shape in warm_up_shapes(self._limits):
            self.choose(self.forward(shape), read=False)

    @property
    def steps(self) -> int:
        """Of the warm-up."""
        return len(warm_up_shapes(self._limits))

    def warm_up(self, done: Callable[[int], None]) -> None:
        """Launch every kernel; done(number of steps)."""
        for number, shape in enumerate(warm_up_shapes(self._limits)):
            done(number)
            self.choose(self.forward(shape))
        done(self.steps)

    def measure(self, memory: DeviceMemory) -> Peaks:
        return Peaks(memory.peak(self._two_steps), memory.peak(self._decode_alone))

    def _two_steps(self) -> None:
        """The largest step, launched when the one before has not been read yet."""
        before = self.forward(self._largest)
        self.choose(self.forward(self._largest))
        del before

    def _decode_alone(self) -> None:
        self.forward(self._decode)


def _row(number: int, logprobs: int | None) -> Row:
    """Of a request that is not there, with a key that no sequence has."""
    key, tokens = -1 - number, list[int]()
    sampling, stopping = SAMPLING[number % len(SAMPLING)], StoppingParams(1)
    return Row(key, key, 0, [0], tokens, sampling, stopping, logprobs=logprobs)
