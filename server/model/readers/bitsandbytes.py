"""A folder in the 4-bit format of bitsandbytes, taken over bit for bit; the format itself is in `lorry.kernels.nf4`.

Keys of a quantized linear `X`: `X.weight` (packed nibbles), `.absmax`, `.quant_map`, with double quantization
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, a JSON text as bytes. Linears
without these keys (`llm_int8_skip_modules`, the output head) stay in floating point.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.readers.safetensors import TensorFolder, forget_redundant
from lorry.server.model.weights import LinearWeight

STATE = "quant_state.bitsandbytes__"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_quantization(quantization: Mapping[str, Any]) -> None:
    """Refuse by name every `quantization_config` but bitsandbytes NF4."""
    method = quantization.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UnsupportedModel(
            f"quantization method {method!r} is not served; bitsandbytes NF4 and 16-bit checkpoints are",
            field="quantization_config.quant_method",
        )
    if not (quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")):
        raise UnsupportedModel(
            "bitsandbytes in 8 bits is not served; 4 bits (nf4) are", field="quantization_config.load_in_4bit"
        )
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise UnsupportedModel(
            f"bnb_4bit_quant_type {kind!r} is not served; 'nf4' is",
            field="quantization_config.bnb_4bit_quant_type",
        )


class BitsandbytesCheckpoint:
    """`Checkpoint` of a pre-quantized folder; linears come as NF4Weight, or as tensors where they were skipped."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.config = config
        self._tensors = TensorFolder(folder)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.take(name, shape)
        if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
            raise MalformedCheckpoint(f"tensor {name!r} is {tensor.dtype}, not floating point", field=name)
        return tensor

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        name = f"{module}.weight"
        if f"{name}.{STATE}fp4" in self._tensors:
            raise UnsupportedModel(f"{module} is quantized as fp4; nf4 is served", field=name)
        if f"{name}.{STATE}nf4" not in self._tensors:
            return self.tensor(name, shape)
        return self._nf4(name, shape)

    def _nf4(self, name: str, shape: tuple[int, int]) -> NF4Weight:
        state = _state(name, self._tensors.take(f"{name}.{STATE}nf4"))
        if tuple(state["shape"]) != shape:
            raise MalformedCheckpoint(f"{name} has shape {state['shape']}; {list(shape)} is expected", field=name)
        if state["dtype"] not in _DTYPES:
            raise MalformedCheckpoint(f"{name} was quantized from {state['dtype']!r}", field=name)
        elements, blocksize = shape[0] * shape[1], int(state["blocksize"])
        blocks = -(-elements // blocksize)
        # quant_storage may be any dtype: the same bytes under another name
        packed = self._tensors.take(name).contiguous().view(torch.uint8).flatten()
        if packed.numel() < (elements + 1) // 2:
            raise MalformedCheckpoint(f"{name} has {packed.numel()} bytes for {elements} weights", field=name)
        absmax = self._tensors.take(f"{name}.absmax", (blocks,))
        code = self._tensors.take(f"{name}.quant_map", (16,)).float()
        nested: dict[str, Any] = {}
        if f"{name}.nested_absmax" in self._tensors:
            nested = {
                "nested_absmax": self._tensors.take(f"{name}.nested_absmax").float(),
                "nested_code": self._tensors.take(f"{name}.nested_quant_map").float(),
                "nested_offset": float(state["nested_offset"]),
                "nested_blocksize": int(state["nested_blocksize"]),
            }
        try:
            return NF4Weight(
                packed=packed[: (elements + 1) // 2],
                absmax=absmax,
                shape=shape,
                blocksize=blocksize,
                dtype=_DTYPES[state["dtype"]],
                code=code,
                **nested,
            )
        except ValueError as error:
            raise MalformedCheckpoint(f"{name}: {error}", field=name) from error

    def close(self) -> None:
        forget_redundant(self._tensors, self.config)
        self._tensors.close()


def _state(name: str, raw: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(raw.to(torch.uint8).tolist()))
    except ValueError as error:
        raise MalformedCheckpoint(f"{name}: the quantization state is not JSON", field=name) from error
    if not isinstance(state, dict) or not {"blocksize", "dtype", "shape"} <= state.keys():
        raise MalformedCheckpoint(f"{name}: the quantization state lacks blocksize, dtype or shape", field=name)
    return state
