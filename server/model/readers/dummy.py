"""Random weights of any shape, made where they will be used: speed is that of a real model, with nothing to read.

Linears are NF4 with double quantization: random codes, absmax within a quarter of 1 / (RMS of the code · √K), so that
products keep the size of what goes in. Norms are 1.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from lorry.kernels.nf4 import CODE, DEFAULT_BLOCKSIZE, NESTED_BLOCKSIZE, NF4Weight, dynamic_map
from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.weights import HEAD, LinearWeight

DTYPE = torch.bfloat16  # of what is not NF4
CODE_RMS = (sum(value * value for value in CODE) / len(CODE)) ** 0.5


class DummyCheckpoint:
    """`Checkpoint` whose tensors depend on their name, their shape, the seed and the kind of device only."""

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self._config = config
        self._device = torch.device(device)
        self._seed = seed
        self._code = torch.tensor(CODE, device=self._device)
        self._nested_code = dynamic_map().to(self._device)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=DTYPE, device=self._device)
        weight = torch.randn(shape, generator=self._generator(name), dtype=DTYPE, device=self._device)
        return weight.div_(shape[-1] ** 0.5)

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        if module == HEAD:
            return self.tensor(f"{module}.weight", shape)
        generator, elements = self._generator(module), shape[0] * shape[1]
        blocks = -(-elements // DEFAULT_BLOCKSIZE)
        scale = 1 / (CODE_RMS * shape[1] ** 0.5)
        return NF4Weight(
            packed=self._bytes((elements + 1) // 2, generator),
            absmax=self._bytes(blocks, generator),
            shape=shape,
            nested_absmax=torch.full((-(-blocks // NESTED_BLOCKSIZE),), scale / 4, device=self._device),
            nested_code=self._nested_code,
            nested_offset=scale,
            dtype=DTYPE,
            code=self._code,
        )

    def close(self) -> None:
        """There is nothing to let go of."""

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))

    def _bytes(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8, device=self._device)


def dummy_folder(source: str) -> Path:
    """The folder of `source`, which needs no more than a config.json; raises ModelNotFound."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"load_format dummy needs a folder with a config.json, {source!r} is none", field="model")
    return folder
