"""Adapter id ↔ folder: the sub-folders of the adapters' folder, and paths below the allowed roots.

Nothing here reads an adapter's content; that is the loader's, in the background.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lorry.adapters.errors import PathRefused
from lorry.adapters.files import Place, below

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


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
        """Every adapter of the folder, by id; hidden sub-folders and those whose name is no id are left out."""
        if self._folder is None:
            return {}
        try:
            names = sorted(os.listdir(self._folder))
        except OSError:
            return {}
        places = ((name, self.find(name)) for name in names if not name.startswith("."))
        return {name: place for name, place in places if place is not None}

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
