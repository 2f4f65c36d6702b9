"""What a remote folder must be able to do, and how one of its files is brought here: continued, capped, checked.

Libraries' errors become few: FileNotFoundError (it has no such file), PermissionError (it refuses us), Changed, and
ConnectionError or TimeoutError for what may pass. None of their messages goes further: they may hold signed addresses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorry.server.errors import MalformedAdapter

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that another try may not meet


class Changed(Exception):
    """A file is another than it was when the fetch began."""


@dataclass(frozen=True)
class Stat:
    """size in bytes, None where it is not told; version: differs whenever the content does, "" where nothing is told;
    sha256: of the content, "" where it is not told."""

    size: int | None
    version: str
    sha256: str = ""


class Remote(Protocol):
    """A folder at a source."""

    def stat(self, name: str) -> Stat:
        """How the file is now, asked anew."""
        ...

    def fill(self, name: str, stat: Stat, path: Path, most: int) -> None:
        """Bring the file `path`, absent or a beginning of the content, to the whole of it, at most `most` bytes."""
        ...


class Ranged(Protocol):
    """A file that can be read from any place on."""

    def read(self, name: str, stat: Stat, offset: int) -> tuple[int, Iterator[bytes]]:
        """Where the bytes begin, `offset` or 0, and the bytes."""
        ...


def too_large(name: str, size: str, most: int) -> MalformedAdapter:
    """The error of a file with more than `most` bytes."""
    return MalformedAdapter(f"{name} has {size} bytes, an adapter of this base has at most {most}", field=name)


def append(remote: Ranged, name: str, stat: Stat, path: Path, most: int) -> None:
    """`Remote.fill` for what can be read in ranges; a version that is not told is read from its beginning."""
    offset = path.stat().st_size if path.exists() and stat.version else 0
    if stat.size is not None and offset > stat.size:
        offset = 0
    if offset == stat.size:
        return
    offset, chunks = remote.read(name, stat, offset)
    with open(path, "r+b" if offset else "wb") as file:
        file.seek(offset)
        file.truncate()
        for chunk in chunks:
            offset += len(chunk)
            if stat.size is not None and offset > stat.size:
                raise MalformedAdapter(
                    f"the source sends more of {name} than the {stat.size} bytes it told", field=name
                )
            if offset > most:
                raise too_large(name, f"more than {most}", most)
            file.write(chunk)
    if stat.size is not None and offset < stat.size:
        raise ConnectionError("the source stopped sending")


def check_digest(name: str, stat: Stat, path: Path) -> None:
    """Compare the content with the digest that the source tells; a wrong one goes. Raises Changed."""
    if not stat.sha256:
        return
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != stat.sha256:
        path.unlink()
        raise Changed(name)
