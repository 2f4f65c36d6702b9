"""The NF4 checkpoint on disk: bitsandbytes' 4-bit safetensors format, which transformers loads as it is.

The folder is filled under another name and renamed when it is whole; `digests.json` is its last file. Layers are
read, quantized and written one after the other, in files of at most `SHARD_BYTES`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorry.adapters.layout import ModelLayout
from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.digests import write_digests
from lorry.server.model.fingerprint import FINGERPRINT_NAME, Fingerprinting
from lorry.server.model.readers.bitsandbytes import STATE
from lorry.server.model.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Checkpoint,
    LinearWeight,
    norm_names,
    read_ends,
    read_layer,
)

Progress = Callable[[str, int, int], None]  # stage, done, total

SHARD_BYTES = 2 * 1024**3


def write_checkpoint(
    checkpoint: Checkpoint,
    hf_config: Mapping[str, Any],
    target: Path,
    add_files: Callable[[Path], None],
    progress: Progress | None = None,
) -> None:
    """Write `checkpoint` as the folder `target`, which must not exist.

    `hf_config` is its config.json, `add_files` puts tokenizer and generation config into the folder it is given.
    Raises FileExistsError when `target` is there, MalformedCheckpoint from the reader.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        tap = Fingerprinting(checkpoint)
        dtypes = _write_tensors(tap, aside, progress)
        (aside / FINGERPRINT_NAME).write_text(tap.fingerprint() + "\n")
        config = {**hf_config, "quantization_config": quantization_config(dtypes)}
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        add_files(aside)
        write_digests(aside)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def quantization_config(dtypes: list[torch.dtype]) -> dict[str, Any]:
    """What tells transformers to load the folder with bitsandbytes; `dtypes`: those that the weights had."""
    compute = max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": _name(compute),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [HEAD],
    }


def nf4_tensors(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    """The safetensors entries of one quantized weight; `name` ends in `.weight`."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": _name(weight.dtype),
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.packed.reshape(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": weight.code.clone(),
    }
    if weight.nested_absmax is not None and weight.nested_code is not None:
        state |= {
            "nested_blocksize": weight.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset,
        }
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = weight.nested_code.clone()
    text = json.dumps(state).encode()
    tensors[f"{name}.{STATE}nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def _write_tensors(checkpoint: Checkpoint, folder: Path, progress: Progress | None) -> list[torch.dtype]:
    """Returns the dtypes from which weights were quantized."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for part in _parts(checkpoint, progress):
        for name, value in part.items():
            if isinstance(value, NF4Weight):
                dtypes.add(value.dtype)
                pending |= nf4_tensors(name, value)
            else:
                pending[name] = value.cpu().contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    checkpoint.close()
    _name_shards(folder, shards)
    return list(dtypes)


def _parts(checkpoint: Checkpoint, progress: Progress | None) -> Iterator[dict[str, LinearWeight]]:
    config = checkpoint.config
    ends = read_ends(checkpoint)
    head = {} if ends.head is None else {f"{HEAD}.weight": ends.head}
    yield {EMBEDDING: ends.embedding, FINAL_NORM: ends.final_norm, **head}
    for layer in range(config.layers):
        if progress:
            progress("quantize", layer, config.layers)
        weights = read_layer(checkpoint, layer)
        tensors: dict[str, LinearWeight] = {
            name: getattr(weights, field) for field, (name, _) in norm_names(config, layer).items()
        }
        path = partial(ModelLayout.module_path, layer)
        tensors |= {f"{path(site)}.weight": weight for site, weight in weights.linears.items()}
        tensors |= {f"{path(site)}.bias": bias for site, bias in weights.biases.items()}
        yield tensors
    if progress:
        progress("quantize", config.layers, config.layers)


def _name_shards(folder: Path, shards: list[list[str]]) -> None:
    """One shard: model.safetensors. Several: model-00001-of-0000n.safetensors and an index."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index_text + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
