"""Adapter id ↔ folder: the sub-folders of the adapters' folder, and paths below the allowed roots.

Nothing here reads an adapter's content; that is the loader's, in the background.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

from lorry.adapters.errors import PathRefused
from lorry.adapters.reading.files import Place, below

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_FILES = 1024  # of an adapter's folder that are looked at
_PART = 64  # names listed between two rests

FilesState = tuple[tuple[str, int, int, int, int, int], ...]
"""Of each file that may be an adapter's: name, device, inode, size, times of the last change to content and inode."""


def files_state(folder: Path) -> FilesState | None:
    """What must differ when the content does; None: the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return tuple(
                sorted(
                    (entry.name, it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns)
                    for entry in islice(entries, _MOST_FILES)
                    if entry.name.startswith("adapter_")
                    for it in (entry.stat(),)
                )
            )
    except OSError:
        return None


def is_valid_id(adapter_id: str) -> bool:
    """[A-Za-z0-9._-]{1,64}, neither "." nor ".."."""
    return _ID.fullmatch(adapter_id) is not None and adapter_id not in (".", "..")


class Catalog:
    """Places on disk. folder: its sub-folders are adapters under their names; roots: where `resolve` may find more.

    Links are resolved, and what they lead to must lie below `folder` or one of `roots`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, roots: Sequence[str | os.PathLike[str]] = ()):
        given = ([folder] if folder is not None else []) + list(roots)
        self._roots = tuple(Path(os.path.realpath(root)) for root in given)
        self._folder = self._roots[0] if folder is not None else None

    def scan(self) -> dict[str, Place]:
        """Every adapter of the folder, by id in order; none where there is no folder."""
        return dict(sorted((self.listed() or {}).items()))

    def last_change(self) -> int | None:
        """When sub-folders were last added, removed or renamed, in nanoseconds; None where nobody can tell."""
        try:
            return os.stat(self._folder).st_mtime_ns if self._folder is not None else None
        except OSError:
            return None

    def listed(self, rest: Callable[[], None] = lambda: None) -> dict[str, Place] | None:
        """Every adapter of the folder, by id; hidden sub-folders and those whose name is no id are left out.

        None: the folder cannot be listed. Only links are looked into, so that thousands of sub-folders take
        milliseconds; `rest` is called every now and then.
        """
        if self._folder is None:
            return {}
        found = {}
        try:
            with os.scandir(self._folder) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % _PART == 0:
                        rest()
                    name = entry.name
                    if name.startswith(".") or not is_valid_id(name):
                        continue
                    if entry.is_symlink():
                        place = self.find(name)
                    else:
                        place = Place(self._folder / name, self._roots) if entry.is_dir() else None
                    if place is not None:
                        found[name] = place
        except OSError:
            return None
        return found

    def find(self, adapter_id: str) -> Place | None:
        """The adapter's sub-folder; None when there is none below the roots, or it is hidden."""
        if self._folder is None or not is_valid_id(adapter_id) or adapter_id.startswith("."):
            return None
        return self._place(self._folder / adapter_id)

    def resolve(self, path: str) -> Place:
        """The folder that a client means by a path relative to a root, the first root that has it.

        Raises PathRefused, which repeats at most what the client said.
        """
        if not self._roots:
            raise PathRefused("this server has no adapter roots, so no path can be loaded", "path")
        pure = PurePosixPath(path)
        if not path or "\0" in path or len(path) > 4096 or pure.is_absolute() or ".." in pure.parts:
            raise PathRefused("the path must be relative to an adapter root, without ..", "path")
        for root in self._roots:
            if place := self._place(root / pure):
                return place
        raise PathRefused(f"no adapter root has a folder {path[:200]!r}", "path")

    def _place(self, path: Path) -> Place | None:
        try:
            real = Path(os.path.realpath(path))
            return Place(real, self._roots) if below(real, self._roots) and real.is_dir() else None
        except (OSError, ValueError):
            return None
