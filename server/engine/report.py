"""What the operator sees of the engine: gauges, and what its counters gained since the last message."""

from __future__ import annotations

from collections import Counter

import msgspec

from lorry.server.engine.messages import AdapterStats, Histogram, Stats
from lorry.server.engine.scheduler import Scheduler

INTERVAL = 0.25  # seconds between two messages while there is work

QUEUE_SECONDS = "request_queue_seconds"
ADAPTER_LOAD_SECONDS = "adapter_load_seconds"
ADAPTER_COPY_SECONDS = "adapter_copy_seconds"
GRAMMAR_COMPILE_SECONDS = "grammar_compile_seconds"
MOST_NAMED = 64  # adapters that requests wait for, told by name


class Report:
    """Collects between two `Stats`; whoever observes something writes it here."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.queue_seconds: list[float] = []
        self.adapter_load_seconds: list[float] = []
        self.adapter_loads: Counter[str] = Counter()
        self.adapter_evictions = 0
        self.adapter_pages = (0, 0)  # used, total
        self.adapters_loaded = 0
        self.adapter_copy_seconds: list[float] = []
        self.adapter_host_evictions = 0
        self.adapters_found: Counter[str] = Counter()
        self.adapters = AdapterStats({}, {}, (), 0)  # the gauges of it
        self.grammar_compile_seconds: list[float] = []
        self.grammar_hits = 0
        self.drafted: Counter[str] = Counter()  # tokens by proposer
        self.accepted: Counter[str] = Counter()
        self._preemptions = 0
        self._next = 0.0
        self._last: tuple[object, ...] = ()

    def due(self, now: float) -> bool:
        """Whether INTERVAL has passed since the last look."""
        return now >= self._next

    def stats(self, now: float) -> Stats | None:
        """What is to be sent at `now`; None when nothing has changed since the last time."""
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        waiting, others = self._waiting()
        adapters = msgspec.structs.replace(
            self.adapters,
            found=dict(self.adapters_found),
            host_evictions=self.adapter_host_evictions,
            waiting=waiting,
            waiting_for_others=others,
        )
        grammar_rows = sum(sequence.request.grammar is not None for sequence in scheduler.running)
        gauges = (len(scheduler.running), len(scheduler.waiting), allocator.used, *self.adapter_pages, grammar_rows)
        preemptions = scheduler.preemptions - self._preemptions
        observed = (
            (QUEUE_SECONDS, self.queue_seconds),
            (ADAPTER_LOAD_SECONDS, self.adapter_load_seconds),
            (ADAPTER_COPY_SECONDS, self.adapter_copy_seconds),
            (GRAMMAR_COMPILE_SECONDS, self.grammar_compile_seconds),
        )
        histograms = [Histogram(name, values) for name, values in observed if values]
        counted = (preemptions, self.adapter_loads, self.adapter_evictions, self.grammar_hits, self.drafted)
        gained = histograms or any(counted)
        self._next = now + INTERVAL
        if not gained and self._last == (*gauges, self.adapters_loaded, adapters):
            return None
        stats = Stats(
            running=gauges[0],
            waiting=gauges[1],
            kv_blocks_used=allocator.used,
            kv_blocks_total=allocator.num_blocks,
            adapter_pages_used=self.adapter_pages[0],
            adapter_pages_total=self.adapter_pages[1],
            preemptions=preemptions,
            adapter_loads=dict(self.adapter_loads),
            adapter_evictions=self.adapter_evictions,
            histograms=histograms,
            adapters_loaded=self.adapters_loaded,
            adapters=adapters,
            grammar_rows=grammar_rows,
            grammar_hits=self.grammar_hits,
            drafted=dict(self.drafted),
            accepted=dict(self.accepted),
        )
        empty = msgspec.structs.replace(adapters, found={}, host_evictions=0)
        self._last = (*gauges, self.adapters_loaded, empty)
        self._preemptions = scheduler.preemptions
        self.queue_seconds, self.adapter_load_seconds = [], []
        self.adapter_loads, self.adapter_evictions = Counter(), 0
        self.adapter_copy_seconds, self.adapter_host_evictions, self.adapters_found = [], 0, Counter()
        self.grammar_compile_seconds, self.grammar_hits = [], 0
        self.drafted, self.accepted = Counter(), Counter()
        return stats

    def _waiting(self) -> tuple[dict[str, int], int]:
        """Requests that wait for an adapter, by its id, the most first, and those for adapters that are not named."""
        requests = {sequence.request: None for sequence in self.scheduler.waiting}
        counts = Counter(adapter for request in requests for adapter in set(request.wants))
        named = dict(counts.most_common(MOST_NAMED))
        return named, counts.total() - sum(named.values())
