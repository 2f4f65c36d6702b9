"""SHA-256 of a checkpoint's files, written beside them and compared before they are used.

`digests.json`: {"model.safetensors": "<64 hex digits>", …}. Folders of other origin have no such file and are
taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorry.server.model.errors import MalformedCheckpoint

NAME = "digests.json"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Write `digests.json` over every other file of the folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    digests = {path.name: file_digest(path) for path in files}
    (folder / NAME).write_text(json.dumps(digests, indent=2) + "\n")


def verify_digests(folder: Path) -> None:
    """Raise MalformedCheckpoint naming the first file that is missing or differs; files hash in parallel."""
    path = folder / NAME
    if not path.exists():
        return
    try:
        digests: dict[str, str] = json.loads(path.read_text())
        named = [folder / Path(name).name for name in digests]
    except (ValueError, TypeError, AttributeError) as error:
        raise MalformedCheckpoint(f"{NAME} is not a table of digests", field=NAME) from error
    for file in named:
        if not file.exists():
            raise MalformedCheckpoint(f"{file.name} of {NAME} is missing", field=file.name)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for file, digest in zip(named, pool.map(file_digest, named), strict=True):
            if digest != digests[file.name]:
                raise MalformedCheckpoint(f"{file.name} differs from its digest: the file is damaged", field=file.name)
