"""The two files of an adapter folder, read once and whole, and the revision that their content has.

    revision = SHA-256 over, for each file in order of name: len(name) · name · len(content) · content

with lengths as 8 bytes little-endian. What is parsed is what was hashed. The weights' header is checked against the
file's size before memory is taken for the rest, so that a file which only claims to be large costs nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from lorry.adapters.errors import AdapterError, MalformedAdapter, PathRefused
from lorry.adapters.pace import Rest, no_rest
from lorry.adapters.reading.spec import CONFIG_NAME, MAX_CONFIG_BYTES
from lorry.adapters.reading.tensor_file import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    WEIGHTS_NAME,
    Header,
    header_bytes,
    parse_header,
)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ENTRIES_SEEN = 1000  # of a folder without weights, to say what is there instead
_PIECE = 256 << 10  # bytes read or hashed at a time; 1 ms of SHA-256

FileState = tuple[int, int, int, int, int]
"""Device, inode, size, times of the last change to content and inode."""


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
    """Contents of the two files, what the weights' header says, and the revision."""

    config: bytearray
    weights: bytearray
    header: Header
    revision: str


def revision_of(files: Sequence[tuple[str, bytes | bytearray]], rest: Rest = no_rest) -> str:
    """64 lower-case hexadecimal digits; files as (name, content)."""
    digest = hashlib.sha256()
    for name, content in sorted(files, key=lambda file: file[0]):
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "little"))
            for begin in range(0, len(part), _PIECE):
                digest.update(memoryview(part)[begin : begin + _PIECE])
                rest()
    return digest.hexdigest()


class Revisions:
    """Revisions that were computed of files as they still are; for all threads.

    A file counts as the same while its state is: the time of the last change to the inode goes on with every write and
    can be set by nobody. Kept is what had been at rest for SETTLED seconds when its reading began: a clock may tick
    once in two seconds, and Linux takes up to 35 until it sees the next write through a mapping.

    most: revisions kept, those asked for last. now: seconds since the epoch, as files have it.
    """

    SETTLED = 40.0

    def __init__(self, most: int = 16384, now: Callable[[], float] = time.time) -> None:
        self._most = most
        self.now = now
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[FileState, ...], str] = OrderedDict()

    def find(self, states: tuple[FileState, ...]) -> str | None:
        with self._lock:
            if (revision := self._known.get(states)) is not None:
                self._known.move_to_end(states)
            return revision

    def keep(self, states: tuple[FileState, ...], revision: str, begun: float) -> None:
        """Of files that had these states before they were read and behind that; `begun` by `now`, before the first."""
        last = max(changed for *_, content, inode in states for changed in (content, inode))
        if last / 1e9 + self.SETTLED > begun:
            return
        with self._lock:
            self._known[states] = revision
            while len(self._known) > self._most:
                self._known.popitem(last=False)


def below(path: Path, roots: Sequence[Path]) -> bool:
    """Whether the real path `path` lies strictly below one of the real `roots`."""
    return any(root in path.parents for root in roots)


def read_adapter(
    place: Place, max_weight_bytes: int, revisions: Revisions | None = None, rest: Rest = no_rest
) -> AdapterFiles:
    """Read both files; raises MalformedAdapter for missing, too large and changing ones, PathRefused for strays.

    revisions: those known already, which need not be computed. rest: called every millisecond of work, about.
    """
    begun = time.time() if revisions is None else revisions.now()
    try:
        with _opened(place, CONFIG_NAME, MAX_CONFIG_BYTES) as (file, config_status):
            config = _fill(file, bytearray(), config_status.st_size, CONFIG_NAME)
    except FileNotFoundError:
        raise MalformedAdapter(f"the folder has no {CONFIG_NAME}", CONFIG_NAME) from None
    try:
        with _opened(place, WEIGHTS_NAME, max_weight_bytes + MAX_HEADER_BYTES) as (file, weights_status):
            header, weights = _read_weights(file, weights_status.st_size, rest)
    except FileNotFoundError:
        raise _no_weights(place) from None
    for name, status in ((CONFIG_NAME, config_status), (WEIGHTS_NAME, weights_status)):
        if _state(os.stat(place.folder / name)) != _state(status):
            raise _changed(name)
    states = _state(config_status), _state(weights_status)
    revision = revisions.find(states) if revisions is not None else None
    if revision is None:
        revision = revision_of(((CONFIG_NAME, config), (WEIGHTS_NAME, weights)), rest)
        if revisions is not None:
            revisions.keep(states, revision, begun)
    if place.revision not in ("", revision):
        raise MalformedAdapter("what was fetched of the adapter is damaged by now: load it again, with replace")
    return AdapterFiles(config, weights, header, revision)


def _read_weights(file: FileIO, size: int, rest: Rest) -> tuple[Header, bytearray]:
    head = _fill(file, bytearray(), min(size, PREFIX_BYTES), WEIGHTS_NAME)
    head = _fill(file, head, PREFIX_BYTES + header_bytes(bytes(head), size), WEIGHTS_NAME)
    header = parse_header(bytes(head), size)
    return header, _fill(file, head, size, WEIGHTS_NAME, rest)


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
            raise MalformedAdapter(
                f"{name} has {status.st_size} bytes, an adapter of this base has at most {max_bytes}", name
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


def _no_weights(place: Place) -> AdapterError:
    with os.scandir(place.folder) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, _ENTRIES_SEEN))
    for name in names:
        if name.endswith(_PICKLES):
            return MalformedAdapter(f"{name[:80]} is not read, only {WEIGHTS_NAME} is", name[:80])
    return MalformedAdapter(f"the folder has no {WEIGHTS_NAME}", WEIGHTS_NAME)
