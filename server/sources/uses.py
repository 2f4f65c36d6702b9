"""What a server has in use of the fetched adapters, said to all who might remove some.

    <root>/servers/<id>.lock   locked as long as the server lives
    <root>/servers/<id>        its revisions, one a line

Nobody waits for anybody: the list is replaced at once, and whoever removes spares what was used a moment ago.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import IO


class Uses:
    """This process's list. It appears with the first revision and goes with `close`, or with the process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._id = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._lock: IO[bytes] | None = None
        self._revisions: frozenset[str] = frozenset()

    @property
    def revisions(self) -> frozenset[str]:
        return self._revisions

    def replace(self, revisions: Collection[str]) -> None:
        """From now on these are in use and no others; those that were are used now for the last time."""
        before, self._revisions = self._revisions, frozenset(revisions)
        if before == self._revisions:
            return
        self._announce()
        aside = self._root / "servers" / f".{self._id}"
        aside.write_text("".join(f"{revision}\n" for revision in sorted(self._revisions)))
        os.replace(aside, self._root / "servers" / self._id)
        for revision in before ^ self._revisions:
            with contextlib.suppress(OSError):
                os.utime(self._root / "adapters" / revision)

    def close(self) -> None:
        """Nothing is in use any more."""
        if self._lock is not None:
            for name in (self._id, f"{self._id}.lock"):
                with contextlib.suppress(OSError):
                    (self._root / "servers" / name).unlink()
            self._lock.close()
            self._lock = None

    def _announce(self) -> None:
        if self._lock is not None:
            return
        servers = self._root / "servers"
        servers.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(servers / f".{self._id}.lock", "wb")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(servers / f".{self._id}.lock", servers / f"{self._id}.lock")  # locked before it is seen
        self._lock = lock


def in_use(root: Path) -> set[str]:
    """The revisions of all living servers; what dead ones left behind goes."""
    revisions: set[str] = set()
    for path in (root / "servers").glob("*.lock"):
        if path.name.startswith("."):
            continue
        said = path.with_suffix("")
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                said.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError):
                revisions.update(said.read_text().split())
        except FileNotFoundError:
            continue
    return revisions
