"""What goes from the store when it holds more than it may.

First partial downloads that nobody is at: those of yesterday always, later ones where there is too much. Then
revisions, the one used longest ago first; never one that a living server has in use, nor one used in the last minutes,
which also spares what is being fetched, handed over or proved right now.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

from lorry.server.sources.uses import in_use

RECENT_SECONDS = 600.0
ABANDONED_SECONDS = 86_400.0  # until then a download goes on where it broke


def prune(root: Path, most_bytes: int | None, now: float | None = None) -> list[str]:
    """Remove until at most `most_bytes` are left, None: only old partial downloads; returns the revisions that went.

    now: seconds since the epoch. Where another process prunes already, nothing is done.
    """
    now = time.time() if now is None else now
    with open(root / "prune.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []
        revisions, parts = _folders(root / "adapters"), _folders(root / "parts")
        surplus = None if most_bytes is None else sum(size for _, size, _ in revisions + parts) - most_bytes
        for used, size, path in sorted(parts):
            too_much = surplus is not None and surplus > 0
            if used < now - ABANDONED_SECONDS or (too_much and used < now - RECENT_SECONDS):
                surplus = _left(surplus, size if _remove_part(root, path) else 0)
        gone: list[str] = []
        if surplus is None or surplus <= 0:
            return gone
        held = in_use(root)
        for used, size, path in sorted(revisions):
            if surplus <= 0 or used >= now - RECENT_SECONDS:
                break
            if path.name not in held and _last_use(path) == used:
                aside = root / "parts" / f"gone-{secrets.token_hex(8)}"  # never seen half removed
                os.rename(path, aside)
                shutil.rmtree(aside, ignore_errors=True)
                gone.append(path.name)
                surplus -= size
        if gone:
            _forget(root, set(gone))
        return gone


def _left(surplus: int | None, removed: int) -> int | None:
    return None if surplus is None else surplus - removed


def _folders(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of the last use, bytes, path) of each sub-folder."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                found.append((_last_use(path), _bytes(path), path))
    return found


def _last_use(path: Path) -> float:
    """A part's is that of what came last."""
    times = [path.stat().st_mtime]
    if path.parent.name == "parts":
        times += [entry.lstat().st_mtime for entry in path.rglob("*")]
    return max(times)


def _bytes(folder: Path) -> int:
    return sum(entry.lstat().st_size for entry in folder.rglob("*") if entry.is_file())


def _remove_part(root: Path, path: Path) -> bool:
    """False: somebody is at it."""
    with open(root / "parts" / f"{path.name}.lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True


def _forget(root: Path, revisions: set[str]) -> None:
    """Remove the notes of versions that had these revisions."""
    for note in (root / "versions").iterdir():
        with contextlib.suppress(OSError, UnicodeError):
            if note.read_text() in revisions:
                note.unlink()
