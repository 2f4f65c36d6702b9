"""Names, labels and the page."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorry.server.engine.messages import AdapterStats, Histogram, Stats
from lorry.server.observability.engine_stats import record
from lorry.server.observability.metrics import FINISH_REASONS, LOAD_RESULTS, PROPOSERS, TIERS, Metrics
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
    "lorry_draft_tokens_total": "counter",
    "lorry_accepted_tokens_total": "counter",
    "lorry_adapter_loads_total": "counter",
    "lorry_adapter_evictions_total": "counter",
    "lorry_adapter_load_seconds": "histogram",
    "lorry_adapter_pages_used": "gauge",
    "lorry_adapter_pages_total": "gauge",
    "lorry_adapters": "gauge",
    "lorry_adapter_bytes": "gauge",
    "lorry_adapter_requests_total": "counter",
    "lorry_adapter_requests_waiting": "gauge",
    "lorry_adapter_tier_load_seconds": "histogram",
    "lorry_adapter_tier_evictions_total": "counter",
    "lorry_lora_requests_info": "gauge",
    "lorry_grammar_compile_seconds": "histogram",
    "lorry_grammar_cache_hits_total": "counter",
    "lorry_grammars_refused_total": "counter",
    "lorry_grammar_rows": "gauge",
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
        metrics.speculated({f"proposer{number}": 2}, {f"proposer{number}": 1})
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
    for name, each in (("lorry_draft_tokens_total", 2), ("lorry_accepted_tokens_total", 1)):
        counts = {labels[0][1]: value for (found_name, labels), value in found.items() if found_name == name}
        assert counts == {**dict.fromkeys(PROPOSERS, 0), "other": 100 * each}


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
            Histogram("adapter_copy_seconds", [0.1]),
            Histogram("request_queue_seconds", [0.01]),
            Histogram("unknown", [1.0]),
        ],
        adapters=AdapterStats(
            by_tier={"device": 2, "host": 3, "disk": 4},
            bytes_by_tier={"device": 20, "host": 50},
            on_device=("a", "b"),
            room=16,
            found={"device": 5, "disk": 1},
            host_evictions=7,
        ),
        drafted={"prompt_lookup": 8, "draft_model": 3},
        accepted={"prompt_lookup": 5},
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
    tiers = {
        "lorry_adapters": (2, 3, 4),
        "lorry_adapter_bytes": (20, 50, None),
        "lorry_adapter_requests_total": (10, 0, 2),
        "lorry_adapter_tier_load_seconds_count": (2, 4, None),
        "lorry_adapter_tier_evictions_total": (12, 14, None),
    }
    for name, values in tiers.items():
        assert tuple(found.get((name, (("tier", tier),))) for tier in TIERS) == values
    for proposer, drafted, accepted in (("prompt_lookup", 16, 10), ("draft_model", 6, 0)):
        labels = (("proposer", proposer),)
        assert found["lorry_draft_tokens_total", labels] == drafted
        assert found["lorry_accepted_tokens_total", labels] == accepted
    assert found["lorry_adapter_loads_total", (("result", "ok"),)] == 8
    assert found["lorry_adapter_loads_total", (("result", "error"),)] == 2


def waiting_series(metrics):
    name = "lorry_adapter_requests_waiting"
    return {labels[0][1]: value for (found, labels), value in samples(metrics).items() if found == name}


def test_few_adapters_have_series_of_their_own():
    metrics = Metrics()
    waiting = {f"a{number}": 100 - number for number in range(60)}
    record(
        metrics, Stats(0, 0, 0, 0, 0, 0, adapters=AdapterStats({}, {}, (), 1, waiting=waiting, waiting_for_others=7))
    )
    found = waiting_series(metrics)
    assert len(found) == 11 and found["a3"] == 97 and "a10" not in found
    assert found["(other)"] == sum(waiting.values()) - sum(range(91, 101)) + 7
    record(metrics, Stats(0, 0, 0, 0, 0, 0, adapters=AdapterStats({}, {}, (), 1, waiting={"b": 1})))
    found = waiting_series(metrics)
    assert found == {"b": 1, "(other)": 0}


def test_one_series_says_what_a_gateway_routes_by():
    """vllm:lora_requests_info of the Gateway API inference extension's model server protocol, under our name."""
    metrics = Metrics()
    for now, on_device, waiting in ((11.0, ("a",), {}), (12.0, ("a", "b"), {"c": 2, "a": 1}), (13.0, ("a", "b"), {})):
        record(metrics, Stats(0, 0, 0, 0, 0, 0, adapters=AdapterStats({}, {}, on_device, 2, waiting=waiting)), now)
        found = [(labels, value) for (name, labels), value in samples(metrics).items() if "lora_requests" in name]
        labels = {
            "max_lora": "2",
            "running_lora_adapters": ",".join(on_device),
            "waiting_lora_adapters": ",".join(waiting),
        }
        assert found == [(tuple(sorted(labels.items())), now)]


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
