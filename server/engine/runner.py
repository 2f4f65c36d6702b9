"""The forward pass of one step: decoder, KV tensors and adapter pages together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorry.adapters.segments import rows_of
from lorry.kernels.lora import AdapterPages
from lorry.server.cache.kv_cache import KVCache
from lorry.server.engine.batch import Batch
from lorry.server.engine.graphs import Bucket, DecodeGraphs, Recorder
from lorry.server.engine.output import Output
from lorry.server.engine.staging import upload
from lorry.server.model.decoder import Decoder
from lorry.server.model.inputs import ModelInputs

SCORED_ROWS = 64  # rows of prompt logits at a time: 64 · 49152 · 4 bytes = 12 MB


class Runner:
    """Owns the model's memory; knows nothing of requests.

    staged: bring a batch's tensors to the device in one copy, instead of reading them where they are. max_running: most
    sequences of a batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        pages: AdapterPages | None,
        staged: bool = False,
        max_running: int = 0,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.pages = pages
        self.device = kv.keys[0].device
        self.graphs: DecodeGraphs | None = None
        self._staged = staged
        self._max_running = max_running
        self._chosen = torch.zeros(max_running, dtype=torch.int64, device=self.device)

    def forward(self, batch: Batch) -> Output:
        """Copy the blocks that forks write, run the flat batch, and take the logits of the rows that decide.

        On a GPU this only launches; a later call that is served by a graph may overwrite the output.
        """
        self.kv.copy_blocks(batch.copies)
        if not self._staged:
            return self._compute(batch.inputs, batch.decided)
        if self.graphs is not None and (bucket := self.graphs.find(batch.inputs)) is not None:
            return self.graphs.replay(batch.inputs, bucket)
        return self._compute(upload(batch.inputs, self.device), batch.decided)

    def keep(self, tokens: Tensor) -> None:
        """tokens: int64 [D] on the device, which the next batch's `sources` speak of."""
        self._chosen[: tokens.shape[0]].copy_(tokens)

    def record(self, buckets: list[Bucket]) -> Iterator[Bucket]:
        """Record decode steps as CUDA graphs; yields each bucket when it is done."""
        config = self.decoder.config
        rows = max(bucket.rows for bucket in buckets)
        output = Output.empty(rows, config.hidden_size, config.vocab_size, self.decoder.dtype, self.device)
        self.graphs = DecodeGraphs(self._compute_into, buckets, output)
        yield from self.graphs.record(Recorder(self.device))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the recorder's stream took to launch each step once

    def logits(self, output: Output, rows: range) -> Iterator[tuple[range, Tensor]]:
        """Logits, float32 [R, V], of consecutive rows of an output, SCORED_ROWS at a time, each with its place in
        `rows`."""
        for start in range(0, len(rows), SCORED_ROWS):
            part = range(start, min(start + SCORED_ROWS, len(rows)))
            first, last = rows[part.start], rows[part.stop - 1] + 1
            segments = None if output.segments is None else rows_of(output.segments, first, last)
            yield part, self.decoder.logits(output.hidden[first:last], None, segments, self.pages)

    def early_logits(self, output: Output, place: int, taps: Sequence[int]) -> Tensor:
        """float32 [J, V]: the head over the streams of one tapped row. taps: indices into `output.tapped`."""
        hidden = torch.stack([output.tapped[tap][place] for tap in taps]).to(self.decoder.dtype)
        if output.tap_segments is None:
            return self.decoder.logits(hidden)
        segments = rows_of(output.tap_segments, place, place + 1)
        return torch.cat([self.decoder.logits(each[None], None, segments, self.pages) for each in hidden])

    def _compute(self, inputs: ModelInputs, deciding: int, logits: Tensor | None = None) -> Output:
        """The launches of one step. logits: where to write them."""
        if inputs.sources is not None:
            chosen = self._chosen.index_select(0, inputs.sources.clamp(min=0))
            inputs = replace(inputs, token_ids=torch.where(inputs.sources >= 0, chosen, inputs.token_ids))
        hidden, tapped = self.decoder.forward_tapped(inputs, self.kv, self.pages)
        hidden = hidden.index_select(0, inputs.logits_rows)
        last = inputs.token_ids.index_select(0, inputs.logits_rows[:deciding])
        segments = inputs.logits_segments
        own = None if segments is None else rows_of(segments, 0, deciding)
        logits = self.decoder.logits(hidden[:deciding], logits, own, self.pages)
        return Output(hidden, logits, last, segments, tapped, inputs.tap_segments)

    def _compute_into(self, inputs: ModelInputs, into: Output) -> None:
        """The same where all rows decide, its output written to a given place."""
        output = self._compute(inputs, into.last.shape[0], into.logits)
        into.hidden.copy_(output.hidden)
        into.last.copy_(output.last)
