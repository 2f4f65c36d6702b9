"""Random weights of any shape, made where they will be used: speed is that of a real model, with nothing to read.

A pool of blocks of 64 weights from N(0, 1) is quantized once. A linear takes a block of it for each of its own, at
random, and scales absmax by 1/√K: codes and absmax are those of a quantized checkpoint. Uniform codes would not do: the
mean of the sixteen is 0.02, and a mean in every weight makes every hidden state the same after a few layers.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lorry.kernels.nf4 import DEFAULT_BLOCKSIZE, NESTED_BLOCKSIZE, NF4Weight, quantize
from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.weights import HEAD, LinearWeight

DTYPE = torch.bfloat16  # of what is not NF4
POOL_BLOCKS = 1 << 16


class DummyCheckpoint:
    """`Checkpoint` whose tensors depend on their name, their shape, the seed and the kind of device only.

    Linears are NF4 with double quantization and variance 1/K, so that products keep the size of what goes in; rows of
    embedding and head have a length of about 1; norms are 1, biases 0.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self._config = config
        self._device = torch.device(device)
        self._seed = seed
        self._normal = torch.empty(POOL_BLOCKS, DEFAULT_BLOCKSIZE, dtype=DTYPE, device=self._device)
        self._normal.normal_(generator=self._generator("pool"))
        self._pool = quantize(self._normal)
        self._packed = self._pool.packed.view(POOL_BLOCKS, DEFAULT_BLOCKSIZE // 2)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith(".bias")), dtype=DTYPE, device=self._device)
        elements = math.prod(shape)
        weight = self._normal.index_select(0, self._blocks(name, elements)).view(-1)[:elements]
        return weight.mul_(shape[-1] ** -0.5).view(shape)

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        if module == HEAD:
            return self.tensor(f"{module}.weight", shape)
        pool, elements, scale = self._pool, math.prod(shape), shape[1] ** -0.5
        assert pool.nested_absmax is not None and pool.nested_offset is not None
        blocks = self._blocks(module, elements)
        groups = -(-blocks.numel() // NESTED_BLOCKSIZE)
        return NF4Weight(
            packed=self._packed.index_select(0, blocks).view(-1)[: (elements + 1) // 2],
            absmax=pool.absmax.index_select(0, blocks),
            shape=shape,
            nested_absmax=(pool.nested_absmax.mean() * scale).repeat(groups),
            nested_code=pool.nested_code,
            nested_offset=pool.nested_offset * scale,
            dtype=DTYPE,
            code=pool.code,
        )

    def close(self) -> None:
        """There is nothing to let go of."""

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))

    def _blocks(self, name: str, elements: int) -> Tensor:
        """Blocks of the pool for the weights of a tensor: int64 [ceil(elements / 64)]."""
        count = -(-elements // DEFAULT_BLOCKSIZE)
        return torch.randint(POOL_BLOCKS, (count,), generator=self._generator(name), device=self._device)


def dummy_folder(source: str) -> Path:
    """The folder of `source`, which needs no more than a config.json; raises ModelNotFound."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"load_format dummy needs a folder with a config.json, {source!r} is none", field="model")
    return folder
