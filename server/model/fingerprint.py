"""Which quantized base a checkpoint is: one name for the same 4-bit weights, wherever and by whom they are read.

    fingerprint = SHA-256(line(m_1) · line(m_2) · …), m: the linears of layer 0, 1, … in the order of SITES, then
                  lm_head where it is not the embedding
    line(m)     = "{m} {N} {K} nf4 {blocksize} {nested blocksize, 0 without} {SHA-256(content), hexadecimal}\\n"
                  for an NF4 linear, "{m} {N} {K} dense\\n" for one that quantization skipped
    content     = codes · absmax · [nested absmax · nested table · nested offset ·] table

in UTF-8; m is the module's path in transformers. Codes are the packed nibbles; absmax is taken as it is stored, uint8
codes under double quantization and float32 otherwise; everything else is float32; all little-endian. What the weights
dequantize to is a choice of whoever computes, and is left out, as are norms, biases and whatever else is no linear.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lorry.adapters.layout import ModelLayout
from lorry.kernels.lora import SITES
from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.config import ModelConfig
from lorry.server.model.weights import HEAD, Checkpoint, CheckpointView, LinearWeight

FINGERPRINT_NAME = "base_fingerprint.txt"  # in the folders that we write

_THREADS = 4
_BACKLOG_BYTES = 256 << 20  # that wait for their hash before reading waits for it


class Fingerprinting(CheckpointView):
    """A checkpoint whose linears are hashed beside whatever else is done with them."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source)
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "fingerprint")
        self._lines: dict[str, Future[str]] = {}
        self._backlog: deque[tuple[Future[str], int]] = deque()
        self._backlog_bytes = 0

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        weight = super().linear(module, shape)
        size = weight.nbytes if isinstance(weight, NF4Weight) else 0
        job = self._lines[module] = self._pool.submit(_line, module, weight)
        self._backlog.append((job, size))
        self._backlog_bytes += size
        while self._backlog_bytes > _BACKLOG_BYTES or (self._backlog and self._backlog[0][0].done()):
            job, size = self._backlog.popleft()
            job.result()
            self._backlog_bytes -= size
        return weight

    def fingerprint(self) -> str:
        """64 hexadecimal digits, once every linear has been read."""
        lines = [self._lines[module].result() for module, _ in _linears(self.config)]
        self._pool.shutdown()
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """The fingerprint of a checkpoint of which nothing else is read."""
    tap = Fingerprinting(checkpoint)
    for module, shape in _linears(checkpoint.config):
        tap.linear(module, shape)
    return tap.fingerprint()


def _linears(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path and [N, K] of every linear, in the order of the fingerprint."""
    shapes = config.linear_shapes()
    for layer in range(config.layers):
        for site in SITES:
            yield ModelLayout.module_path(layer, site), shapes[site]
    if not config.tie_embeddings:
        yield HEAD, (config.vocab_size, config.hidden_size)


def _line(module: str, weight: LinearWeight) -> str:
    if isinstance(weight, Tensor):
        return f"{module} {weight.shape[0]} {weight.shape[1]} dense\n"
    digest = hashlib.sha256()
    for tensor in (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code):
        if tensor is not None:
            digest.update(_bytes(tensor))
    if weight.nested_offset is not None:
        digest.update(struct.pack("<f", weight.nested_offset))
    digest.update(_bytes(weight.code))
    nested = weight.nested_blocksize if weight.double_quantized else 0
    rows, columns = weight.shape
    return f"{module} {rows} {columns} nf4 {weight.blocksize} {nested} {digest.hexdigest()}\n"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data
