"""From the name of a model to a decoder that runs, and from a 16-bit checkpoint to an NF4 one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lorry.kernels.nf4_linear import Products
from lorry.server.config import LoadFormat
from lorry.server.model.config import ModelConfig
from lorry.server.model.decoder import Decoder
from lorry.server.model.digests import NAME as DIGESTS_NAME
from lorry.server.model.digests import verify_digests
from lorry.server.model.errors import MalformedCheckpoint, UnsupportedModel
from lorry.server.model.fingerprint import FINGERPRINT_NAME, Fingerprinting, fingerprint
from lorry.server.model.quantizing import QuantizingCheckpoint
from lorry.server.model.readers.bitsandbytes import BitsandbytesCheckpoint, check_quantization
from lorry.server.model.readers.dummy import DummyCheckpoint, dummy_folder
from lorry.server.model.readers.safetensors import SafetensorsCheckpoint, read_json
from lorry.server.model.store import DEFAULT_MODEL, convert_gguf, default_gguf, forget_converted, resolve_model
from lorry.server.model.weights import Checkpoint
from lorry.server.model.writer import Progress, write_checkpoint

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def load_model(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    products: Products = "float32",
    context_length: int | None = None,
    load_format: LoadFormat = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Decoder:
    """Load `source` (see `resolve_model`) for computing in `dtype` on `device`, with NF4 `products` of that kind.

    load_format "dummy": random weights, of `seed`, of the shape that the config.json in folder `source` tells.

    `context_length` shortens the model's own. `progress(stage, done, total)` has the stages "quantize" and
    "load", counted in layers. A converted model whose files do not match their digests is converted again.
    Raises ModelNotFound, UnsupportedModel, MalformedCheckpoint.
    """
    known = ""
    if load_format == "dummy":
        checkpoint: Checkpoint = DummyCheckpoint(read_config(dummy_folder(source))[0], device, seed)
    else:
        folder = _verified(source, progress)
        known = stored_fingerprint(folder)
        checkpoint = open_checkpoint(folder, device) if known else Fingerprinting(open_checkpoint(folder, device))
    decoder = Decoder.from_checkpoint(
        checkpoint, device=device, dtype=dtype, products=products, context_length=context_length, progress=progress
    )
    decoder.fingerprint = checkpoint.fingerprint() if isinstance(checkpoint, Fingerprinting) else known
    return decoder


def _verified(source: str, progress: Progress | None) -> Path:
    """The folder of `source`, whose files match their digests."""
    folder = resolve_model(source, progress=progress)
    try:
        verify_digests(folder)
    except MalformedCheckpoint:
        if not forget_converted(folder):
            raise
        folder = resolve_model(source, progress=progress)
    return folder


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The folder's ModelConfig and its config.json."""
    config = read_json(folder, "config.json")
    if config is None:
        raise MalformedCheckpoint(f"{folder} has no config.json", field="config.json")
    return ModelConfig.from_hf(config, read_json(folder, "generation_config.json")), dict(config)


def stored_fingerprint(folder: Path) -> str:
    """The fingerprint that stands in a folder of ours, under its digests; "" where there is none."""
    digests = read_json(folder, DIGESTS_NAME) or {}
    return (folder / FINGERPRINT_NAME).read_text().strip() if FINGERPRINT_NAME in digests else ""


def base_fingerprint(folder: Path) -> str:
    """The fingerprint of the base that `load_model` makes of a folder: stored, or computed from all its linears."""
    return stored_fingerprint(folder) or fingerprint(open_checkpoint(folder))


def open_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """The folder's tensors with NF4 linears: as they are in the files, or quantized when they are read."""
    config, raw = read_config(folder)
    if quantization := raw.get("quantization_config"):
        check_quantization(quantization)
        return BitsandbytesCheckpoint(folder, config)
    return QuantizingCheckpoint(SafetensorsCheckpoint(folder, config), device)


def quantize_checkpoint(source: str, target: str | Path, *, progress: Progress | None = None) -> Path:
    """Write the NF4 checkpoint of `source`, a folder or hub id in 16 or 32 bits or a .gguf file, as folder `target`.

    transformers loads the result with bitsandbytes. Raises FileExistsError when `target` is there, UnsupportedModel
    when `source` is quantized already, ModelNotFound, MalformedCheckpoint.
    """
    target = Path(target).expanduser()
    if target.exists():
        raise FileExistsError(f"{target} exists")
    path = Path(source).expanduser()
    if source == DEFAULT_MODEL and not path.exists():
        path = default_gguf()
    if path.suffix == ".gguf" and path.is_file():
        convert_gguf(path, target, progress)
        return target
    folder = resolve_model(source, progress=progress)
    config, raw = read_config(folder)
    if raw.get("quantization_config"):
        raise UnsupportedModel(f"{source} is quantized already", field="quantization_config")

    def add_files(aside: Path) -> None:
        for name in _TOKENIZER_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, aside / name)

    checkpoint = QuantizingCheckpoint(SafetensorsCheckpoint(folder, config))
    write_checkpoint(checkpoint, raw, target, add_files, progress)
    return target
