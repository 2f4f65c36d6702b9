"""The two files of an adapter folder, read once and whole, and the revision that their content has.

    revision = SHA-256 over, for each file in order of name: len(name) · name · len(content) · content

with lengths as 8 bytes little-endian. What is parsed is what was hashed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorry.adapters.errors import AdapterError, MalformedAdapter, PathRefused
from lorry.adapters.spec import CONFIG_NAME, MAX_CONFIG_BYTES
from lorry.adapters.tensor_file import MAX_HEADER_BYTES, WEIGHTS_NAME

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Place:
    """Where an adapter lies: its real folder, and the real roots that its files must not leave.

    revision: the only one that its content may have, "" where any may be.
    """

    folder: Path
    roots: tuple[Path, ...]
    revision: str = ""

    @classmethod
    def named_by_revision(cls, folder: str) -> Place:
        """A folder that was fetched, whose name is its revision."""
        path = Path(os.path.realpath(folder))
        return cls(path, (path.parent,), path.name)


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """Contents of the two files and their revision."""

    config: bytearray
    weights: bytearray
    revision: str


def revision_of(files: Sequence[tuple[str, bytes | bytearray]]) -> str:
    """64 lower-case hexadecimal digits; files as (name, content)."""
    digest = hashlib.sha256()
    for name, content in sorted(files, key=lambda file: file[0]):
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def below(path: Path, roots: Sequence[Path]) -> bool:
    """Whether the real path `path` lies strictly below one of the real `roots`."""
    return any(root in path.parents for root in roots)


def read_adapter(place: Place, max_weight_bytes: int) -> AdapterFiles:
    """Read both files; raises MalformedAdapter for missing, too large and changing ones, PathRefused for strays."""
    config, config_state = _read(place, CONFIG_NAME, MAX_CONFIG_BYTES)
    try:
        weights, weights_state = _read(place, WEIGHTS_NAME, max_weight_bytes + MAX_HEADER_BYTES)
    except FileNotFoundError:
        raise _no_weights(place) from None
    for name, state in ((CONFIG_NAME, config_state), (WEIGHTS_NAME, weights_state)):
        if _state(os.stat(place.folder / name)) != state:
            raise MalformedAdapter(f"{name} changed while it was read, try again", name)
    revision = revision_of(((CONFIG_NAME, config), (WEIGHTS_NAME, weights)))
    if place.revision not in ("", revision):
        raise MalformedAdapter("what was fetched of the adapter is damaged by now: load it again, with replace")
    return AdapterFiles(config, weights, revision)


State = tuple[int, int, int, int]


def _state(status: os.stat_result) -> State:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(place: Place, name: str, max_bytes: int) -> tuple[bytearray, State]:
    real = Path(os.path.realpath(place.folder / name))
    if not below(real, place.roots):
        raise PathRefused(f"{name} leads out of the adapter roots", name)
    try:
        # O_NONBLOCK: a pipe in place of a file must not hang the loader.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if name == CONFIG_NAME:
            raise MalformedAdapter(f"the folder has no {name}", name) from None
        raise
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedAdapter(f"{name} is not a regular file", name)
        if status.st_size > max_bytes:
            raise MalformedAdapter(
                f"{name} has {status.st_size} bytes, an adapter of this base has at most {max_bytes}", name
            )
        content = bytearray(status.st_size)
        view, filled = memoryview(content), 0
        while filled < len(content) and (count := file.readinto(view[filled:])):
            filled += count
        if filled < len(content) or _state(os.fstat(descriptor)) != _state(status):
            raise MalformedAdapter(f"{name} changed while it was read, try again", name)
    return content, _state(status)


def _no_weights(place: Place) -> AdapterError:
    others = sorted(entry.name for entry in os.scandir(place.folder) if entry.name.endswith(_PICKLES))
    if others:
        return MalformedAdapter(f"{others[0]} is not read, only {WEIGHTS_NAME} is", others[0])
    return MalformedAdapter(f"the folder has no {WEIGHTS_NAME}", WEIGHTS_NAME)
