"""What a step is made of: the wall clock against the time in which the GPU runs anything.

    idle share = 1 - busy / wall

busy: what the GPU's own record (CUPTI, by torch.profiler) says of a step: the union of its kernels' and copies' times,
so that gaps between two kernels count as idle, those inside a graph too. wall: of a step in steady state, without the
profiler. forward: of a step's graph when many are launched one behind the other, by events; it holds the gaps inside
the graph and no sampling, so that 1 - forward / wall is what the loop could win at most beside sampling.

This case comes last: the record stays attached to the process, and graphs have to be recorded under it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

import torch
from gpu.measure import Figure, elapsed
from steps.decode import steady, watched
from steps.session import Session, adapters_of
from steps.sizes import Mix
from torch.profiler import ProfilerActivity, profile

from lorry.server.engine.batch import Batch

PROFILED = 24  # steps
FORWARDS = 50


def idle(session: Session) -> Iterator[Figure]:
    rows = session.sizes.bare
    with profile(activities=[ProfilerActivity.CPU if session.stage.dry else ProfilerActivity.CUDA]):
        torch.zeros(1, device=session.stage.device).add_(1)
    session.record([bucket for bucket in session.buckets if bucket.rows == rows])
    for mix in session.sizes.mixes_of(rows):
        requests = session.requests(rows, adapters_of(mix), session.sizes.steps)
        gaps = steady(session, requests)
        figure = Figure("step apart", str(mix), rows, None, 0.0)
        busy, forward = record(session, mix, rows)
        if not session.stage.dry:
            if not busy:
                raise RuntimeError("the profiler saw no kernel")
            figure.seconds = statistics.mean(gaps)
            figure.parts = {"busy": busy, "forward": forward}
        yield figure


def record(session: Session, mix: Mix, rows: int) -> tuple[float, float | None]:
    """Seconds of a step: busy, and of its forward pass alone."""
    sizes, dry = session.sizes, session.stage.dry
    requests = session.requests(rows, adapters_of(mix), sizes.steps)
    count = min(PROFILED, sizes.steps - sizes.warm - 2)
    with watched(session) as seen:
        session.engine.send(*requests)
        for _ in range(sizes.warm):
            session.engine.step()
        _wait(dry)
        with profile(activities=[ProfilerActivity.CPU if dry else ProfilerActivity.CUDA]) as trace:
            for _ in range(count):
                session.engine.step()
            _wait(dry)
        while session.engine.step():
            pass
    session.taken(requests)
    events = trace.events() or []
    spans = [
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type.name == "CUDA"
    ]
    return union(spans) / count, forward_seconds(session, seen.last)


def forward_seconds(session: Session, batch: Batch | None) -> float | None:
    """Of the last batch of all, run again and again; what it writes nobody reads."""
    assert batch is not None

    def forwards() -> None:
        with torch.inference_mode():
            for _ in range(1 if session.stage.dry else FORWARDS):
                session.runner.forward(batch)

    if session.stage.dry:
        forwards()
        return None
    return statistics.median(elapsed(forwards) for _ in range(3)) / FORWARDS


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what the spans cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _wait(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()
