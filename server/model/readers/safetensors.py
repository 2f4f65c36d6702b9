"""A Hugging Face folder: config.json and one or many safetensors files, read tensor by tensor through mmap."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import MalformedCheckpoint, ModelNotFound
from lorry.server.model.weights import HEAD, LinearWeight


class TensorFolder:
    """The tensors of all safetensors files of a folder by name; remembers which were taken.

    Raises ModelNotFound when there is no safetensors file (pickled files are not read), MalformedCheckpoint when
    the index names a file that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where = self._locate()
        self._left = set(self._where)

    def _locate(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            for file in sorted(set(weight_map.values())):
                if Path(file).name != file or not (self.folder / file).exists():
                    raise MalformedCheckpoint(f"{index.name} names {file!r}, which is not there", field=file)
            return dict(weight_map)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ModelNotFound(f"no safetensors file in {self.folder}", field=str(self.folder))
        whole = [file for file in files if file.name == "model.safetensors"] or files
        return {name: file.name for file in whole for name in self._names(file.name)}

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
            except Exception as error:
                raise MalformedCheckpoint(f"{file} is not a whole safetensors file: {error}", field=file) from error
        return self._files[file]

    def _names(self, file: str) -> list[str]:
        return list(self._open(file).keys())

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor as stored; raises MalformedCheckpoint when it is missing or of another shape."""
        if name not in self._where:
            raise MalformedCheckpoint(f"tensor {name!r} is missing", field=name)
        try:
            tensor: Tensor = self._open(self._where[name]).get_tensor(name)
        except MalformedCheckpoint:
            raise
        except Exception as error:
            raise MalformedCheckpoint(f"{self._where[name]}: {name}: {error}", field=name) from error
        if shape is not None and tuple(tensor.shape) != shape:
            raise MalformedCheckpoint(
                f"tensor {name!r} has shape {list(tensor.shape)}; {list(shape)} is expected", field=name
            )
        self._left.discard(name)
        return tensor

    def drop(self, name: str) -> None:
        """Count a tensor as read that is known not to matter."""
        self._left.discard(name)

    def close(self) -> None:
        """Close the files; raises MalformedCheckpoint naming a tensor that was never taken."""
        self._files.clear()
        if self._left:
            name = min(self._left)
            raise MalformedCheckpoint(
                f"{len(self._left)} tensors are not part of this architecture, the first is {name!r}", field=name
            )


class SafetensorsCheckpoint:
    """`Checkpoint` of a folder in 16 or 32 bits; linears come as floating-point tensors."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.config = config
        self._tensors = TensorFolder(folder)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.take(name, shape)
        if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
            raise MalformedCheckpoint(f"tensor {name!r} is {tensor.dtype}, not floating point", field=name)
        return tensor

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        return self.tensor(f"{module}.weight", shape)

    def close(self) -> None:
        forget_redundant(self._tensors, self.config)
        self._tensors.close()


def forget_redundant(tensors: TensorFolder, config: ModelConfig) -> None:
    """Old checkpoints store the rotary frequencies, some a tied head once more: both follow from the rest."""
    for layer in range(config.layers):
        tensors.drop(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")
    tensors.drop("model.rotary_emb.inv_freq")
    if config.tie_embeddings:
        tensors.drop(f"{HEAD}.weight")


def read_json(folder: Path, name: str) -> Mapping[str, Any] | None:
    """A JSON object of the folder, None where there is no such file; raises MalformedCheckpoint when it is none."""
    path = folder / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MalformedCheckpoint(f"{name} is not JSON: {error}", field=name) from error
    if not isinstance(content, dict):
        raise MalformedCheckpoint(f"{name} is not a JSON object", field=name)
    return content
