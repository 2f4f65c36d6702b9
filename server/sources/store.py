"""Fetched adapters on this machine's disk: folders named by their content, so that each proves itself.

    <root>/adapters/<revision>/   an adapter's files, whole; revision: SHA-256 as `lorry.adapters.reading.files` has it
    <root>/versions/<key>         the revision that a source's version turned out to have
    <root>/parts/<key>/           what was fetched so far of a version
    <root>/servers/               what is in use (`uses.py`)

key: SHA-256 of a source with the version identity that it gives its files. Several processes may share a root. The
time of a revision's folder is that of its last use; what goes when there is too much, `prune.py` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

CONFIG, WEIGHTS = FILES = ("adapter_config.json", "adapter_model.safetensors")


def default_root() -> Path:
    """`$XDG_CACHE_HOME/lorry/sources`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lorry" / "sources"


def revision_of(folder: Path, names: Iterable[str] | None = None) -> str:
    """The revision of a folder's files, all of them or those called so; raises OSError where one is no regular file.

    The engine hashes what it has in memory (`lorry.adapters.reading.revisions`); here nothing is held there.
    """
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder) if names is None else names):
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            for value in (name.encode(), None):
                length = size if value is None else len(value)
                digest.update(length.to_bytes(8, "little") + (value or b""))
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class Store:
    """The folders below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("adapters", "versions", "parts", "servers"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Alone with `key`, or a revision, among all processes; waits for another that has it."""
        with open(self._root / "parts" / f"{key}.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def find(self, key: str) -> str | None:
        """The revision of a version that is here whole and undamaged; one that is damaged goes."""
        note = self._root / "versions" / key
        try:
            revision = note.read_text()
        except OSError:
            return None
        self._touch(revision)  # before it is proved: from here on nobody removes it for a while
        if self._proved(revision):
            return revision
        note.unlink(missing_ok=True)
        return None

    def part(self, key: str) -> Path:
        """The folder in which a version is gathered."""
        folder = self._root / "parts" / key
        folder.mkdir(exist_ok=True)
        return folder

    def discard(self, key: str) -> None:
        """Forget what was gathered of a version."""
        shutil.rmtree(self._root / "parts" / key, ignore_errors=True)

    def keep(self, key: str, names: Collection[str] = FILES) -> str:
        """The gathered files of a version become a folder of its revision, which is returned."""
        part = self.part(key)
        revision = revision_of(part, names)
        with self.locked(revision):  # which another version may have too
            if not self._proved(revision):
                whole, place = part / "whole", self._root / "adapters" / revision
                shutil.rmtree(whole, ignore_errors=True)
                whole.mkdir()
                for name in names:
                    os.replace(part / name, whole / name)
                with contextlib.suppress(FileNotFoundError):
                    os.rename(place, part / f"damaged-{secrets.token_hex(4)}")
                os.rename(whole, place)
            self._touch(revision)
        note = self._root / "versions" / f"{key}.{secrets.token_hex(4)}"
        note.write_text(revision)
        os.replace(note, self._root / "versions" / key)
        self.discard(key)
        return revision

    def _touch(self, revision: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.utime(self._root / "adapters" / revision)

    def _proved(self, revision: str) -> bool:
        try:
            return revision_of(self._root / "adapters" / revision) == revision
        except (OSError, ValueError):
            return False
