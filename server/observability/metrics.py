"""Every Prometheus metric of the server, in a registry of its own.

Label values come from closed sets: whatever is not in one is counted as "other", so that no client can grow
the page. Ids of adapters are labels only of the few that most requests wait for, and of one series in the form that the
Kubernetes Gateway API inference extension reads. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import lorry

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""From arrival to first token, to last token, in the queue: 5 ms to 5 min."""
TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Between two tokens of one sequence: 0.5 ms to 5 s."""
LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""From an adapter's files to checked tensors in host memory: 5 ms to 1 min."""
COMPILE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""To compile a grammar: 0.5 ms to 5 s."""

FINISH_REASONS = frozenset({"eos", "stop", "length", "time_limit", "aborted", "cancelled", "deadline", "error"})
LOAD_RESULTS = frozenset({"ok", "error"})
TIERS = ("device", "host", "disk")
PROPOSERS = frozenset({"prompt_lookup", "draft_model"})
WAITING_SHOWN = 10
"""Adapters that have a series of their own in lorry_adapter_requests_waiting; the rest is "(other)"."""
GRPC_CODES = frozenset(
    {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    }
)


class Metrics:
    """All metrics, registered once; thread-safe as prometheus_client's are.

    Method names become label values once `allow_grpc_methods` has named them.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._grpc_methods: set[str] = set()
        r = self.registry
        self.requests_running = Gauge("lorry_requests_running", "Sequences in the batch.", registry=r)
        self.requests_waiting = Gauge("lorry_requests_waiting", "Requests that wait to be scheduled.", registry=r)
        self.kv_cache_usage_ratio = Gauge(
            "lorry_kv_cache_usage_ratio", "Share of the key and value blocks in use, 0 to 1.", registry=r
        )
        self.time_to_first_token = Histogram(
            "lorry_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=LATENCY_BUCKETS,
            registry=r,
        )
        self.inter_token_latency = Histogram(
            "lorry_inter_token_latency_seconds",
            "Between two tokens of one sequence.",
            buckets=TOKEN_BUCKETS,
            registry=r,
        )
        self.e2e_request_latency = Histogram(
            "lorry_e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            buckets=LATENCY_BUCKETS,
            registry=r,
        )
        self.request_queue = Histogram(
            "lorry_request_queue_seconds",
            "From a request's arrival until it was first scheduled.",
            buckets=LATENCY_BUCKETS,
            registry=r,
        )
        self.prompt_tokens = Counter("lorry_prompt_tokens_total", "Prompt tokens of started requests.", registry=r)
        self.generation_tokens = Counter("lorry_generation_tokens_total", "Tokens generated.", registry=r)
        self.requests_finished = Counter(
            "lorry_requests_finished_total",
            "Requests that ended: " + ", ".join(sorted(FINISH_REASONS)) + ".",
            ["reason"],
            registry=r,
        )
        self.grpc_requests = Counter(
            "lorry_grpc_requests_total",
            "Calls that ended, by method and status code.",
            ["method", "code"],
            registry=r,
        )
        self.preemptions = Counter(
            "lorry_preemptions_total", "Sequences whose blocks were taken away, to be recomputed.", registry=r
        )
        self.draft_tokens = Counter(
            "lorry_draft_tokens_total", "Tokens proposed ahead of the model.", ["proposer"], registry=r
        )
        self.accepted_tokens = Counter(
            "lorry_accepted_tokens_total",
            "Tokens proposed that the model chose too; over lorry_draft_tokens_total: the acceptance.",
            ["proposer"],
            registry=r,
        )
        self.grammar_compile = Histogram(
            "lorry_grammar_compile_seconds",
            "To compile a grammar in the engine, beside its steps.",
            buckets=COMPILE_BUCKETS,
            registry=r,
        )
        self.grammar_cache_hits = Counter(
            "lorry_grammar_cache_hits_total", "Requests whose grammar was compiled already.", registry=r
        )
        self.grammars_refused = Counter(
            "lorry_grammars_refused_total", "Requests refused for their grammar.", registry=r
        )
        self.grammar_rows = Gauge(
            "lorry_grammar_rows", "Sequences in the batch whose output is structured.", registry=r
        )
        self.adapter_loads = Counter(
            "lorry_adapter_loads_total",
            "Loads of adapters that ended: " + ", ".join(sorted(LOAD_RESULTS)) + ".",
            ["result"],
            registry=r,
        )
        self.adapter_evictions = Counter(
            "lorry_adapter_evictions_total", "Adapters pushed off the device by others.", registry=r
        )
        self.adapter_load = Histogram(
            "lorry_adapter_load_seconds",
            "From an adapter's files to checked tensors in host memory.",
            buckets=LOAD_BUCKETS,
            registry=r,
        )
        self.adapter_pages_used = Gauge("lorry_adapter_pages_used", "Rank pages in use.", registry=r)
        self.adapter_pages_total = Gauge("lorry_adapter_pages_total", "Rank pages there are.", registry=r)
        self.adapters = Gauge(
            "lorry_adapters",
            "Adapters, each in the first place that has it: device, host (memory), disk.",
            ["tier"],
            registry=r,
        )
        self.adapter_bytes = Gauge(
            "lorry_adapter_bytes",
            "Bytes of adapters on the device and in host memory, copies there of what is on the device included.",
            ["tier"],
            registry=r,
        )
        self.adapter_requests = Counter(
            "lorry_adapter_requests_total",
            "Adapters of requests, by the place that had them when the request came: device, host, disk.",
            ["tier"],
            registry=r,
        )
        self.adapter_tier_load = Histogram(
            "lorry_adapter_tier_load_seconds",
            "host: from disk to host memory, checks included; device: from there to the device, once there is room.",
            ["tier"],
            buckets=LOAD_BUCKETS,
            registry=r,
        )
        self.adapter_tier_evictions = Counter(
            "lorry_adapter_tier_evictions_total",
            "Adapters that left the device, and those that left host memory and are on disk only.",
            ["tier"],
            registry=r,
        )
        self.adapter_requests_waiting = Gauge(
            "lorry_adapter_requests_waiting",
            f"Requests that wait, for each of the {WAITING_SHOWN} adapters that most wait for and for the (other)s.",
            ["adapter"],
            registry=r,
        )
        self.lora_requests_info = Gauge(
            "lorry_lora_requests_info",
            "When the labels were last true, as Unix time; what the Gateway API inference extension routes by.",
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=r,
        )
        self._waiting_shown: set[str] = set()
        self._lora_labels: tuple[str, str, str] | None = None
        self.engine_up = Gauge("lorry_engine_up", "1 while the engine process serves, else 0.", registry=r)
        self.build_info = Gauge(
            "lorry_build_info",
            "Always 1; the labels say what runs.",
            ["version", "model", "device"],
            registry=r,
        )
        for reason in FINISH_REASONS:
            self.requests_finished.labels(reason)
        for result in LOAD_RESULTS:
            self.adapter_loads.labels(result)
        for proposer in PROPOSERS:
            self.draft_tokens.labels(proposer)
            self.accepted_tokens.labels(proposer)
        for tier in TIERS:
            self.adapters.labels(tier)
            self.adapter_requests.labels(tier)
        for tier in ("device", "host"):
            self.adapter_bytes.labels(tier)
            self.adapter_tier_load.labels(tier)
            self.adapter_tier_evictions.labels(tier)

    def allow_grpc_methods(self, methods: frozenset[str]) -> None:
        """Add full names ("/lorry.v1.GenerationService/Generate") to the closed set of label values."""
        self._grpc_methods |= methods

    def grpc_finished(self, method: str, code: str) -> None:
        """Count a call that ended with a status `code` such as "OK"."""
        self.grpc_requests.labels(
            method if method in self._grpc_methods else "other", code if code in GRPC_CODES else "other"
        ).inc()

    def request_finished(self, reason: str) -> None:
        """Count a request that ended for one of FINISH_REASONS."""
        self.requests_finished.labels(reason if reason in FINISH_REASONS else "other").inc()

    def adapters_loaded(self, by_result: Mapping[str, int]) -> None:
        """Count loads that ended, by one of LOAD_RESULTS."""
        for result, count in by_result.items():
            self.adapter_loads.labels(result if result in LOAD_RESULTS else "other").inc(count)

    def speculated(self, drafted: Mapping[str, int], accepted: Mapping[str, int]) -> None:
        """Count tokens proposed and accepted, by one of PROPOSERS."""
        for counter, counts in ((self.draft_tokens, drafted), (self.accepted_tokens, accepted)):
            for proposer, count in counts.items():
                counter.labels(proposer if proposer in PROPOSERS else "other").inc(count)

    def adapters_waited_for(self, waiting: Mapping[str, int], others: int) -> None:
        """Set how many requests wait for which adapters; those that most wait for come first."""
        named = list(waiting.items())
        shown = dict(named[:WAITING_SHOWN])
        shown["(other)"] = others + sum(count for _, count in named[WAITING_SHOWN:])
        for adapter, count in shown.items():
            self.adapter_requests_waiting.labels(adapter).set(count)
        for adapter in self._waiting_shown - shown.keys():
            self.adapter_requests_waiting.remove(adapter)
        self._waiting_shown = set(shown)

    def lora_requests(self, room: int, on_device: Sequence[str], waiting: Sequence[str], now: float) -> None:
        """Say which adapters are ready to serve and which are waited for, true at the Unix time `now`."""
        labels = str(max(room, len(on_device))), ",".join(on_device), ",".join(waiting)
        self.lora_requests_info.labels(*labels).set(now)
        if self._lora_labels not in (None, labels):
            self.lora_requests_info.remove(*self._lora_labels)
        self._lora_labels = labels

    def engine_started(self, model: str, device: str) -> None:
        """The engine serves `model` on `device`."""
        self.engine_up.set(1)
        self.build_info.clear()
        self.build_info.labels(lorry.__version__, model, device).set(1)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self.registry)
