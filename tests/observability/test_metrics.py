"""Names, labels and the page."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorry.server.engine.messages import Histogram, Stats
from lorry.server.observability.engine_stats import record
from lorry.server.observability.metrics import FINISH_REASONS, LOAD_RESULTS, Metrics
from lorry.server.observability.page import metrics_page

NAMES = {
    "lorry_requests_running": "gauge",
    "lorry_requests_waiting": "gauge",
    "lorry_kv_cache_usage_ratio": "gauge",
    "lorry_time_to_first_token_seconds": "histogram",
    "lorry_inter_token_latency_seconds": "histogram",
    "lorry_e2e_request_latency_seconds": "histogram",
    "lorry_request_queue_seconds": "histogram",
    "lorry_prompt_tokens_total": "counter",
    "lorry_generation_tokens_total": "counter",
    "lorry_requests_finished_total": "counter",
    "lorry_grpc_requests_total": "counter",
    "lorry_preemptions_total": "counter",
    "lorry_adapter_loads_total": "counter",
    "lorry_adapter_evictions_total": "counter",
    "lorry_adapter_load_seconds": "histogram",
    "lorry_adapter_pages_used": "gauge",
    "lorry_adapter_pages_total": "gauge",
    "lorry_engine_up": "gauge",
    "lorry_build_info": "gauge",
}


def samples(metrics):
    found = {}
    for family in text_string_to_metric_families(metrics.page().decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_every_metric_has_its_name_and_kind():
    types = {}
    for line in Metrics().page().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            types[name] = kind
    assert {name: types[name] for name in NAMES} == NAMES
    assert {name for name in types if not name.endswith("_created")} == set(NAMES)


def test_two_instances_do_not_share_a_registry():
    one, other = Metrics(), Metrics()
    one.generation_tokens.inc(3)
    assert samples(other)["lorry_generation_tokens_total", ()] == 0


def test_labels_are_bounded():
    metrics = Metrics()
    metrics.allow_grpc_methods(frozenset({"/s/Known"}))
    metrics.grpc_finished("/s/Known", "OK")
    for number in range(100):
        metrics.grpc_finished(f"/s/Unknown{number}", f"CODE{number}")
        metrics.request_finished(f"reason{number}")
        metrics.adapters_loaded({f"result{number}": 1})
    found = samples(metrics)
    calls = {labels: value for (name, labels), value in found.items() if name == "lorry_grpc_requests_total"}
    assert calls == {
        (("code", "OK"), ("method", "/s/Known")): 1,
        (("code", "other"), ("method", "other")): 100,
    }
    reasons = {labels[0][1] for name, labels in found if name == "lorry_requests_finished_total"}
    assert reasons == FINISH_REASONS | {"other"}
    results = {labels[0][1] for name, labels in found if name == "lorry_adapter_loads_total"}
    assert results == LOAD_RESULTS | {"other"}


def test_a_new_engine_replaces_the_build_info():
    metrics = Metrics()
    metrics.engine_started("one", "cpu")
    metrics.engine_started("two", "cpu")
    models = [dict(labels)["model"] for name, labels in samples(metrics) if name == "lorry_build_info"]
    assert models == ["two"]


def test_the_engines_numbers_are_set_and_added():
    metrics = Metrics()
    stats = Stats(
        running=3,
        waiting=5,
        kv_blocks_used=7,
        kv_blocks_total=28,
        adapter_pages_used=11,
        adapter_pages_total=13,
        preemptions=2,
        adapter_loads={"ok": 4, "error": 1},
        adapter_evictions=6,
        histograms=[
            Histogram("adapter_load_seconds", [0.2, 0.3]),
            Histogram("request_queue_seconds", [0.01]),
            Histogram("unknown", [1.0]),
        ],
    )
    record(metrics, stats)
    record(metrics, stats)
    found = samples(metrics)
    expected = {
        "lorry_requests_running": 3,
        "lorry_requests_waiting": 5,
        "lorry_kv_cache_usage_ratio": 0.25,
        "lorry_adapter_pages_used": 11,
        "lorry_adapter_pages_total": 13,
        "lorry_preemptions_total": 4,
        "lorry_adapter_evictions_total": 12,
        "lorry_adapter_load_seconds_count": 4,
        "lorry_request_queue_seconds_count": 2,
    }
    assert {name: found[name, ()] for name in expected} == expected
    assert found["lorry_adapter_loads_total", (("result", "ok"),)] == 8
    assert found["lorry_adapter_loads_total", (("result", "error"),)] == 2


def test_no_blocks_are_no_usage():
    metrics = Metrics()
    record(metrics, Stats(0, 0, 0, 0, 0, 0))
    assert samples(metrics)["lorry_kv_cache_usage_ratio", ()] == 0


def test_the_page_is_served_while_asked_for():
    metrics = Metrics()
    with metrics_page(metrics, "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}/metrics"
        body = urllib.request.urlopen(url, timeout=60).read().decode()
        assert "lorry_engine_up 0.0" in body
        with pytest.raises(OSError), metrics_page(metrics, "127.0.0.1", port):
            pass
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=1)
    with metrics_page(metrics, "127.0.0.1", None) as port:
        assert port is None
