"""The engine's own numbers become metrics."""

from __future__ import annotations

import time

from lorry.server.engine.messages import AdapterStats, Stats
from lorry.server.observability.metrics import TIERS, Metrics


def record(metrics: Metrics, stats: Stats, now: float | None = None) -> None:
    """Set the gauges and add what the counters and histograms gained since the last `Stats`. now: Unix time."""
    now = time.time() if now is None else now
    metrics.requests_running.set(stats.running)
    metrics.requests_waiting.set(stats.waiting)
    metrics.kv_cache_usage_ratio.set(stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0)
    metrics.adapter_pages_used.set(stats.adapter_pages_used)
    metrics.adapter_pages_total.set(stats.adapter_pages_total)
    metrics.preemptions.inc(stats.preemptions)
    metrics.grammar_rows.set(stats.grammar_rows)
    metrics.grammar_cache_hits.inc(stats.grammar_hits)
    metrics.speculated(stats.drafted, stats.accepted)
    metrics.adapters_loaded(stats.adapter_loads)
    metrics.adapter_evictions.inc(stats.adapter_evictions)
    metrics.adapter_tier_evictions.labels("device").inc(stats.adapter_evictions)
    _record_adapters(metrics, stats.adapters or AdapterStats({}, {}, (), 0), now)
    histograms = {
        "request_queue_seconds": (metrics.request_queue,),
        "adapter_load_seconds": (metrics.adapter_load, metrics.adapter_tier_load.labels("host")),
        "adapter_copy_seconds": (metrics.adapter_tier_load.labels("device"),),
        "grammar_compile_seconds": (metrics.grammar_compile,),
    }
    for histogram in stats.histograms:
        for target in histograms.get(histogram.name, ()):
            for value in histogram.values:
                target.observe(value)


def _record_adapters(metrics: Metrics, stats: AdapterStats, now: float) -> None:
    for tier in TIERS:
        metrics.adapters.labels(tier).set(stats.by_tier.get(tier, 0))
        metrics.adapter_requests.labels(tier).inc(stats.found.get(tier, 0))
    for tier in ("device", "host"):
        metrics.adapter_bytes.labels(tier).set(stats.bytes_by_tier.get(tier, 0))
    metrics.adapter_tier_evictions.labels("host").inc(stats.host_evictions)
    metrics.adapters_waited_for(stats.waiting, stats.waiting_for_others)
    metrics.lora_requests(stats.room, stats.on_device, list(stats.waiting), now)
