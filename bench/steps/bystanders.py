"""Streams that decode while adapters of others are read from disk, copied to the device and unloaded again.

Phases with and without loads in turn, each of the same texts; a gap is from one step's tokens to the next one's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np
from gpu.measure import Figure, Wrong
from steps.session import Session
from steps.sizes import Mix
from workload import adapter_name, write_adapters

from lorry.server.engine.messages import LoadAdapter, UnloadAdapter

FOLDERS = 4
AT_ONCE = 2  # loads under way


class Guests:
    """Loads one adapter after the other, and unloads each when it is there."""

    def __init__(self, session: Session, folders: list[str]) -> None:
        self.loaded = 0
        self._session = session
        self._folders = itertools.cycle(folders)
        self._ids = itertools.count()
        self._calls: dict[int, str] = {}

    def go_on(self, begin: bool = True) -> bool:
        """Between two steps: unload what is there, load others; whether any is under way."""
        engine = self._session.engine
        for call, name in list(self._calls.items()):
            if (reply := engine.replies.pop(call, None)) is not None:
                del self._calls[call]
                if reply.error is not None:
                    raise RuntimeError(f"{name} does not load: {reply.error.message}")
                self.loaded += 1
                engine.send(UnloadAdapter(-call - 1, name))
        while begin and len(self._calls) < AT_ONCE:
            number = next(self._ids)
            call, name = 1_000_000 + number, f"guest-{number}"
            self._calls[call] = name
            engine.send(LoadAdapter(call, name, next(self._folders)))
        return bool(self._calls)


def bystanders(session: Session) -> Iterator[Figure]:
    sizes, dry = session.sizes, session.stage.dry
    folder = write_adapters(sizes.model, session.guests, FOLDERS)
    guests = Guests(session, [f"{folder.name}/{adapter_name(number)}" for number in range(FOLDERS)])
    gaps: dict[bool, list[float]] = {False: [], True: []}
    loads = 0.0
    for _ in range(sizes.phases):
        for loading in (False, True):
            begin = time.perf_counter()
            gaps[loading] += phase(session, guests if loading else None)
            loads += (time.perf_counter() - begin) * loading
    if not guests.loaded:
        raise Wrong("no adapter was loaded beside the streams")
    figure = Figure("bystanders", "while adapters load", sizes.streams, None, 0.0)
    figure.plan = f"{guests.loaded} loads of {session.page_bytes / 1e6:.0f} MB"
    if not dry:
        figure.plan += f", {guests.loaded * session.page_bytes / loads / 1e9:.2f} GB/s"
        (quiet50, quiet99), (busy50, busy99) = (np.percentile(gaps[loading], (50, 99)) for loading in (False, True))
        figure.seconds = float(busy99)
        figure.parts = {"p50": float(busy50), "quiet p50": float(quiet50), "quiet p99": float(quiet99)}
    yield figure


def phase(session: Session, guests: Guests | None) -> list[float]:
    """Gaps of one round of streams, every other one with an adapter."""
    sizes = session.sizes
    requests = session.requests(sizes.streams, lambda row: Mix(1).adapter(0) if row % 2 else None, sizes.stream_steps)
    session.engine.send(*requests)
    moments = list[float]()
    while True:
        if guests is not None:
            guests.go_on()
        if not session.engine.step():
            break
        moments.append(time.perf_counter())
    while guests is not None and guests.go_on(begin=False):
        session.engine.step()
    session.engine.run()
    session.taken(requests)
    kept = moments[sizes.warm : sizes.stream_steps - 1]
    return [after - before for before, after in itertools.pairwise(kept)]
