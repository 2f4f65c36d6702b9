"""HTTPS by fsspec: streamed, so that a server cannot send more than is taken; no redirect is followed.

A download goes on by `Range` with `If-Range` (RFC 9110, 13.1.5 and 14.2): a server whose file has changed answers with
the whole of it, and its ETag shows that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorry.server.errors import PathRefused
from lorry.server.sources.address import Source
from lorry.server.sources.remote import PASSING, Changed, Stat, append

CHUNK_BYTES = 1 << 20
STALL_SECONDS = 30.0
CONNECT_SECONDS = 10.0
RANGE_NOT_SATISFIABLE = 416  # of a server that cannot go on there, though the file is the same

_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]+)?")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Answer(Exception):
    """A status that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


async def _check_status(response: Any) -> None:
    if not 200 <= response.status < 300:
        raise Answer(response.status)


class Folder:
    """A folder of a web server. plain: without TLS, which only a server on this machine may be (for tests)."""

    def __init__(self, source: Source, plain: bool = False, stall_seconds: float = STALL_SECONDS) -> None:
        import aiohttp
        from fsspec.implementations.http import HTTPFileSystem

        plain = plain and _LOOPBACK.fullmatch(source.parts[0]) is not None
        self._url = f"{'http' if plain else 'https'}://{'/'.join(source.parts)}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=stall_seconds)
        self._filesystem = HTTPFileSystem(
            skip_instance_cache=True,
            allow_redirects=False,
            client_kwargs={
                "timeout": timeout,
                "auto_decompress": False,
                "raise_for_status": _check_status,
                "trust_env": not plain,  # the proxies that the operator has set
            },
        )

    def stat(self, name: str) -> Stat:
        try:
            info = self._filesystem.info(f"{self._url}/{name}")
        except Exception as error:
            raise _ours(error, name) from None
        version = info.get("ETag") or info.get("Last-Modified") or ""
        return Stat(info["size"], version)

    def fill(self, name: str, stat: Stat, path: Path, most: int) -> None:
        append(self, name, stat, path, most)

    def read(self, name: str, stat: Stat, offset: int) -> tuple[int, Iterator[bytes]]:
        headers = {"Accept-Encoding": "identity"}
        if offset and not stat.version.startswith("W/"):  # a weak ETag does not vouch for bytes
            headers |= {"Range": f"bytes={offset}-", "If-Range": stat.version}
        try:
            file = self._filesystem.open(f"{self._url}/{name}", block_size=0, size=stat.size or 1, headers=headers)
        except Exception as error:
            if offset and isinstance(error, Answer) and error.status == RANGE_NOT_SATISFIABLE:
                return self.read(name, stat, 0)
            raise _ours(error, name) from None
        response = file.r
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ConnectionError("the source sends an encoded body")
        etag = response.headers.get("ETag")
        if etag is not None and etag != stat.version:
            raise Changed(name)
        begin = 0
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != offset or match[2] not in ("*", str(stat.size)):
                raise Changed(name)
            begin = offset
        return begin, _chunks(file, name)


def _chunks(file: Any, name: str) -> Iterator[bytes]:
    try:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
    except Exception as error:
        raise _ours(error, name) from None
    finally:
        file.close()


def _ours(error: BaseException, name: str) -> Exception:
    """The error of `remote` that a library's means."""
    import aiohttp

    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # what `info` makes of any error
        error = error.__cause__
    if isinstance(error, Answer):
        status = error.status
        if 300 <= status < 400:
            return PathRefused(f"the source redirects {name} to another place, which is not followed", field="path")
        if status in (404, 410):
            return FileNotFoundError(name)
        if status in (401, 403):
            return PermissionError(name)
        return ConnectionError(f"HTTP {status}") if status in PASSING else OSError(f"HTTP {status}")
    if isinstance(error, TimeoutError):
        return TimeoutError("the source is silent")
    if isinstance(error, aiohttp.ClientError):
        return ConnectionError(type(error).__name__)
    return error if isinstance(error, Exception) else OSError(type(error).__name__)
