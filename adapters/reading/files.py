"""The files of an adapter folder, read once and whole, and the revision that their content has (`revisions.py`).

    adapter_config.json and adapter_model.safetensors, or in its place an index and the shards that it names

What is parsed is what was hashed. The weights' header is checked against the
file's size, and a shard's against the index, before memory is taken for the rest, so that a file which only claims to
be large costs nothing. All files of weights together may be as large as one alone.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from torch import Tensor

from lorry.adapters.errors import MalformedAdapter, PathRefused
from lorry.adapters.pace import Rest, no_rest
from lorry.adapters.reading import listing
from lorry.adapters.reading.revisions import FileState, Revisions, revision_of
from lorry.adapters.reading.shards import INDEX_NAME, MAX_INDEX_BYTES, ShardIndex, is_shard
from lorry.adapters.reading.spec import CONFIG_NAME, MAX_CONFIG_BYTES
from lorry.adapters.reading.tensor_file import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    WEIGHTS_NAME,
    Header,
    header_bytes,
    parse_header,
    parse_tensors,
)

_PIECE = 256 << 10  # bytes read at a time


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
class Weights:
    """One file of tensors: its content and what its header says."""

    content: bytearray
    header: Header


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """What was read: the config, the weights (shards in order of their numbers), the shards' metadata together, and the
    revision."""

    config: bytearray
    weights: tuple[Weights, ...]
    metadata: dict[str, str]
    revision: str

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; they share the memory of the contents."""
        parts = (parse_tensors(part.content, part.header) for part in self.weights)
        return {name: tensor for part in parts for name, tensor in part.items()}


def below(path: Path, roots: Sequence[Path]) -> bool:
    """Whether the real path `path` lies strictly below one of the real `roots`."""
    return any(root in path.parents for root in roots)


def read_adapter(
    place: Place, max_weight_bytes: int, revisions: Revisions | None = None, rest: Rest = no_rest
) -> AdapterFiles:
    """Read all files; raises MalformedAdapter for missing, too large and changing ones, PathRefused for strays.

    revisions: those known already, which need not be computed. rest: called every millisecond of work, about.
    """
    begun = time.time() if revisions is None else revisions.now()
    contents: dict[str, bytearray] = {}
    statuses: dict[str, os.stat_result] = {}
    try:
        contents[CONFIG_NAME], statuses[CONFIG_NAME] = _read(place, CONFIG_NAME, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise listing.no_config(place.folder) from None
    expected: dict[str, frozenset[str] | None] = {WEIGHTS_NAME: None}  # and the tensors of each, where an index says so
    metadata: dict[str, str] = {}
    names = listing.weight_names(place.folder)
    if INDEX_NAME in names:
        contents[INDEX_NAME], statuses[INDEX_NAME] = _read(place, INDEX_NAME, MAX_INDEX_BYTES)
        index = ShardIndex.from_bytes(bytes(contents[INDEX_NAME]))
        expected, metadata = dict(index.shards), index.metadata
    for name in names:
        if name not in expected and (name == WEIGHTS_NAME or (is_shard(name) and expected.keys() & names)):
            raise MalformedAdapter(f"the folder has {name} besides {next(iter(expected))}: which is meant?", name)
    left = max_weight_bytes + MAX_HEADER_BYTES
    weights = {}
    for name, tensors in expected.items():
        try:
            with _opened(place, name, left) as (file, statuses[name]):
                weights[name] = _read_weights(file, statuses[name].st_size, name, tensors, rest)
        except FileNotFoundError:
            raise listing.no_weights(place.folder, name) from None
        left -= statuses[name].st_size
    for name, status in statuses.items():
        if _state(os.stat(place.folder / name)) != _state(status):
            raise _changed(name)
    states = tuple((name, _state(status)) for name, status in sorted(statuses.items()))
    revision = revisions.find(states) if revisions is not None else None
    if revision is None:
        revision = revision_of([*contents.items(), *((name, part.content) for name, part in weights.items())], rest)
        if revisions is not None:
            revisions.keep(states, revision, begun)
    if place.revision not in ("", revision):
        raise MalformedAdapter("what was fetched of the adapter is damaged by now: load it again, with replace")
    return AdapterFiles(contents[CONFIG_NAME], tuple(weights.values()), _metadata(metadata, weights), revision)


def _read(place: Place, name: str, max_bytes: int) -> tuple[bytearray, os.stat_result]:
    with _opened(place, name, max_bytes) as (file, status):
        return _fill(file, bytearray(), status.st_size, name), status


def _read_weights(file: FileIO, size: int, name: str, expected: frozenset[str] | None, rest: Rest) -> Weights:
    head = _fill(file, bytearray(), min(size, PREFIX_BYTES), name)
    head = _fill(file, head, PREFIX_BYTES + header_bytes(bytes(head), size, name), name)
    header = parse_header(bytes(head), size, name)
    if expected is not None and (odd := expected ^ header.tensors.keys()):
        tensor = min(odd)
        where = f"is not in {name}" if tensor in expected else f"is in {name}"
        told = "where" if tensor in expected else "which is not where"
        raise MalformedAdapter(f"{tensor[:200]!r} {where}, {told} {INDEX_NAME} says it is", tensor[:200])
    return Weights(_fill(file, head, size, name, rest), header)


def _metadata(of_index: dict[str, str], weights: dict[str, Weights]) -> dict[str, str]:
    """That of all files, which may not contradict each other."""
    metadata = dict(of_index)
    for name, part in weights.items():
        for key, value in part.header.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise MalformedAdapter(f"{name} has another {key[:80]!r} in its metadata than the other files", name)
    return metadata


def _state(status: os.stat_result) -> FileState:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _opened(place: Place, name: str, max_bytes: int) -> Iterator[tuple[FileIO, os.stat_result]]:
    """The regular file `name` below the roots, and its state, which it must still have when it has been read."""
    with _open(place, name) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise MalformedAdapter(f"{name} is not a regular file", name)
        if status.st_size > max_bytes:
            so_far = " besides the shards before it" if is_shard(name) else ""
            raise MalformedAdapter(
                f"{name} has {status.st_size} bytes, an adapter of this base has at most {max_bytes}{so_far}", name
            )
        yield file, status
        if _state(os.fstat(file.fileno())) != _state(status):
            raise _changed(name)


def _open(place: Place, name: str) -> FileIO:
    real = Path(os.path.realpath(place.folder / name))
    if not below(real, place.roots):
        raise _stray(name)
    if not stat.S_ISREG(os.stat(real, follow_symlinks=False).st_mode):
        raise MalformedAdapter(f"{name} is not a regular file", name)  # not opened: a device may act on that
    # O_NONBLOCK: a pipe that has just taken the file's place must not hang the loader.
    file = FileIO(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        # A folder on the way may have become a link since its real path was found; Linux tells what was opened.
        opened = Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:
        return file
    if opened != real and not below(opened, place.roots):
        file.close()
        raise _stray(name)
    return file


def _fill(file: FileIO, begun: bytearray, size: int, name: str, rest: Rest = no_rest) -> bytearray:
    """`begun`, read on to `size` bytes."""
    if len(begun) == size:
        return begun
    content = bytearray(size)
    content[: len(begun)] = begun
    view, filled = memoryview(content), len(begun)
    while filled < size and (count := file.readinto(view[filled : filled + _PIECE])):
        filled += count
        rest()
    if filled < size:
        raise _changed(name)
    return content


def _stray(name: str) -> PathRefused:
    return PathRefused(f"{name} leads out of the adapter roots", name)


def _changed(name: str) -> MalformedAdapter:
    return MalformedAdapter(f"{name} changed while it was read, try again", name)
