"""The engine's own numbers become metrics."""

from __future__ import annotations

from lorry.server.engine.messages import Stats
from lorry.server.observability.metrics import Metrics


def record(metrics: Metrics, stats: Stats) -> None:
    """Set the gauges and add what the counters and histograms gained since the last `Stats`."""
    metrics.requests_running.set(stats.running)
    metrics.requests_waiting.set(stats.waiting)
    metrics.kv_cache_usage_ratio.set(stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0)
    metrics.adapter_pages_used.set(stats.adapter_pages_used)
    metrics.adapter_pages_total.set(stats.adapter_pages_total)
    metrics.preemptions.inc(stats.preemptions)
    metrics.adapters_loaded(stats.adapter_loads)
    metrics.adapter_evictions.inc(stats.adapter_evictions)
    histograms = {
        "request_queue_seconds": metrics.request_queue,
        "adapter_load_seconds": metrics.adapter_load,
    }
    for histogram in stats.histograms:
        if (target := histograms.get(histogram.name)) is not None:
            for value in histogram.values:
                target.observe(value)
