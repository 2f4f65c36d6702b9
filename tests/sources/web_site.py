"""A web server on this machine that serves an adapter's files, well or badly, and what it was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

CONFIG = b'{"r": 3}'
WEIGHTS = bytes(range(251)) * 1301
SHARDED = {
    "adapter_model-00001-of-00002.safetensors": WEIGHTS[:100_003],
    "adapter_model-00002-of-00002.safetensors": WEIGHTS[100_003:],
}
SHARDED["adapter_model.safetensors.index.json"] = json.dumps(
    {"metadata": {}, "weight_map": {f"t{number}": name for number, name in enumerate(sorted(SHARDED))}}
).encode()
"""The weights in two files, and their index."""


@dataclass
class Site:
    """What is served: path → content and ETag. spoil: may answer a request (path, offset) itself and return True."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    spoil: Callable[[Any, str, int], bool] = lambda handler, path, offset: False
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    port: int = 0

    def gets(self) -> list[tuple[str, str]]:
        """(last component, range) of each GET."""
        return [(path.rsplit("/", 1)[1], range) for method, path, range in self.asked if method == "GET"]

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.port}/mine/a"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        site, path = self.site, self.path
        asked = self.headers.get("Range", "")
        site.asked.append((self.command, path, asked))
        content, etag = site.files.get(path), site.etags.get(path, '"one"')
        offset = 0
        if content is not None and asked and site.ranges and self.headers.get("If-Range", etag) == etag:
            offset = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if site.spoil(self, path, offset):
            return
        if content is None:
            self.answer(404, b"no such file")
            return
        headers = {"ETag": etag} if etag else {}
        if offset:
            headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        self.answer(206 if offset else 200, content[offset:], **headers)

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
