"""The Prometheus page, served from threads of its own, so that a scrape never waits for the event loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import start_http_server

from lorry.server.observability.metrics import Metrics


@contextlib.contextmanager
def metrics_page(metrics: Metrics, host: str, port: int | None) -> Iterator[int | None]:
    """Serve `metrics` on http://host:port/metrics inside the block; yields the port (0 asks for any free one).

    None serves nothing. Raises OSError when the port is taken.
    """
    if port is None:
        yield None
        return
    server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
