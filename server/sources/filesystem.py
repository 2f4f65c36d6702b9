"""S3 and Google Cloud Storage by fsspec; credentials are those of the server's environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorry.server.sources.address import Source
from lorry.server.sources.remote import Stat, append

CHUNK_BYTES = 4 << 20
_VERSIONS = ("VersionId", "generation", "ETag", "etag", "md5Hash", "LastModified", "updated", "mtime", "created")


class Folder:
    """A folder below a bucket of `filesystem` (fsspec's AbstractFileSystem)."""

    def __init__(self, filesystem: Any, source: Source) -> None:
        self._filesystem = filesystem
        self._path = "/".join(source.parts)

    def stat(self, name: str) -> Stat:
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(f"{self._path}/{name}")
        if info["type"] != "file":
            raise FileNotFoundError(name)
        versions = {key: str(info[key]) for key in _VERSIONS if info.get(key)}
        return Stat(info["size"], json.dumps(versions) if versions else "")

    def fill(self, name: str, stat: Stat, path: Path, most: int) -> None:
        append(self, name, stat, path, most)

    def read(self, name: str, stat: Stat, offset: int) -> tuple[int, Iterator[bytes]]:
        return offset, self._chunks(name, offset)

    def _chunks(self, name: str, offset: int) -> Iterator[bytes]:
        options = {"block_size": CHUNK_BYTES, "cache_type": "readahead"}
        with self._filesystem.open(f"{self._path}/{name}", "rb", **options) as file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def open_folder(source: Source) -> Folder:
    """The folder by the installed filesystem of its scheme."""
    import fsspec

    return Folder(fsspec.filesystem(source.scheme, skip_instance_cache=True, use_listings_cache=False), source)
