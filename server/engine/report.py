"""What the operator sees of the engine: gauges, and what its counters gained since the last message."""

from __future__ import annotations

from collections import Counter

from lorry.server.engine.messages import Histogram, Stats
from lorry.server.engine.scheduler import Scheduler

INTERVAL = 0.25  # seconds between two messages while there is work

QUEUE_SECONDS = "request_queue_seconds"
ADAPTER_LOAD_SECONDS = "adapter_load_seconds"


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
        self._preemptions = 0
        self._next = 0.0
        self._last: tuple[object, ...] = ()

    def due(self, now: float) -> bool:
        """Whether INTERVAL has passed since the last look."""
        return now >= self._next

    def stats(self, now: float) -> Stats | None:
        """What is to be sent at `now`; None when nothing has changed since the last time."""
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        gauges = (len(scheduler.running), len(scheduler.waiting), allocator.used, *self.adapter_pages)
        preemptions = scheduler.preemptions - self._preemptions
        observed = ((QUEUE_SECONDS, self.queue_seconds), (ADAPTER_LOAD_SECONDS, self.adapter_load_seconds))
        histograms = [Histogram(name, values) for name, values in observed if values]
        gained = preemptions or self.adapter_loads or self.adapter_evictions or histograms
        self._next = now + INTERVAL
        if not gained and self._last == (*gauges, self.adapters_loaded):
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
        )
        self._last = (*gauges, self.adapters_loaded)
        self._preemptions = scheduler.preemptions
        self.queue_seconds, self.adapter_load_seconds = [], []
        self.adapter_loads, self.adapter_evictions = Counter(), 0
        return stats
