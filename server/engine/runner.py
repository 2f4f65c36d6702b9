"""The forward pass of one step: decoder, KV tensors and adapter pages together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lorry.kernels.lora import AdapterPages, Segments
from lorry.server.cache.kv_cache import KVCache
from lorry.server.engine.batch import Batch
from lorry.server.model.decoder import Decoder
from lorry.server.model.inputs import ModelInputs

SCORED_ROWS = 64  # rows of prompt logits at a time: 64 · 49152 · 4 bytes = 12 MB


@dataclass(frozen=True, slots=True)
class Output:
    """hidden: [R, H] of the batch's logits rows; logits: float32 [deciding pieces, V]."""

    hidden: Tensor
    logits: Tensor


class Runner:
    """Owns the model's memory; knows nothing of requests."""

    def __init__(self, decoder: Decoder, kv: KVCache, pages: AdapterPages | None) -> None:
        self.decoder = decoder
        self.kv = kv
        self.pages = pages
        self.device = kv.keys[0].device

    def forward(self, batch: Batch) -> Output:
        """Copy the blocks that forks write, run the flat batch, and take the logits of the rows that decide."""
        self.kv.copy_blocks(batch.copies)
        inputs = batch.inputs if self.device.type == "cpu" else self._to_device(batch.inputs)
        hidden = self.decoder.forward(inputs, self.kv, self.pages)
        hidden = hidden.index_select(0, inputs.logits_rows)
        return Output(hidden, self.decoder.logits(hidden[: len(batch.deciding)]))

    def prompt_logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 logits) of `hidden` [R, H], SCORED_ROWS rows at a time."""
        for start in range(0, hidden.shape[0], SCORED_ROWS):
            yield start, self.decoder.logits(hidden[start : start + SCORED_ROWS])

    def _to_device(self, inputs: ModelInputs) -> ModelInputs:
        segments = inputs.segments
        return replace(
            inputs,
            **_moved(inputs, self.device),
            segments=None if segments is None else replace(segments, **_moved(segments, self.device)),
        )


def _moved(record: ModelInputs | Segments, device: torch.device) -> dict[str, Any]:
    """The record's own tensors on `device`, by field."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
