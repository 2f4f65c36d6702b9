"""A web server on this machine, and jobs that may ask it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from lorry.server.sources.job import Job

sys.path.insert(0, str(Path(__file__).parent))  # web_site.py serves several tests here

from web_site import CONFIG, WEIGHTS, Handler, Site


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site({"/mine/a/adapter_config.json": CONFIG, "/mine/a/adapter_model.safetensors": WEIGHTS})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"site": site}))
    server.handle_error = lambda *_: None  # a client that has had enough
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """job(source): into a store of this test, with hardly a wait between attempts."""

    def make(source: str, max_weights_bytes: int = len(WEIGHTS)) -> Job:
        return Job(
            source=source,
            root=str(tmp_path / "store"),
            max_weights_bytes=max_weights_bytes,
            first_wait=0.001,
            plain_http=True,
        )

    return make
