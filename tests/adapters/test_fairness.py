"""More adapters are wanted than fit: whoever is the oldest gets in soon, and who needs no room does not wait for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lorry.adapters import library
from lorry.adapters.lease import Lease
from lorry.adapters.loader import Loaded, Loader
from lorry.adapters.residency import PATIENCE

LONGEST = 30  # polls that a stream lasts
ADAPTERS = 14


class InLine(Loader):
    """Loads at once, one for each poll, so that a life depends on its seed alone."""

    def submit(self, token: int, place: Any) -> None:
        adapter, error = self._load(place)
        self._done.put(Loaded(token, adapter, error, 0.0))


@pytest.fixture(autouse=True)
def _in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "Loader", InLine)


@pytest.mark.parametrize(("seed", "host_memory"), [(0, 0), (1, 0), (2, 40_000)])
def test_the_oldest_gets_in_soon(
    drive: Any, write_adapter: Any, tmp_path: Path, ref: Any, seed: int, host_memory: int
) -> None:
    """Streams of 14 adapters, some in mixes, popular and rare ones, room for three beside a pinned one."""
    rng = random.Random(seed)
    for number in range(ADAPTERS):
        write_adapter(tmp_path / f"a{number}", seed=number)
    driver = drive(max_slots=4, host_memory=host_memory)
    manager = driver.manager
    manager.pin_adapter(1, "a0", True)
    driver.until(lambda: 1 in driver.replies)
    popularity = [1 / place for place in range(1, ADAPTERS)]
    waiting: list[Lease] = []
    running: dict[Lease, int] = {}
    oldest, since, longest, started = None, 0, 0, 0
    for poll in range(700):
        if rng.random() < 0.3:
            chosen = rng.choices(range(1, ADAPTERS), popularity, k=rng.choice([1, 1, 1, 2]))
            waiting.append(manager.request([ref(f"a{number}") for number in chosen]))
        if rng.random() < 0.1:
            pinned = driver.request("a0")
            assert manager.ready(pinned), "it is there, and waits for nobody"
            manager.pin(pinned)
            running[pinned] = poll + rng.randint(1, LONGEST)
        for lease in list(waiting):
            if manager.ready(lease):
                manager.pin(lease)
                waiting.remove(lease)
                running[lease] = poll + rng.randint(1, LONGEST)
                started += 1
        for lease, end in list(running.items()):
            if end <= poll:
                del running[lease]
                manager.release(lease)
        if waiting and rng.random() < 0.01:
            manager.release(waiting.pop(rng.randrange(len(waiting))))
        if waiting and waiting[0] is not oldest:
            oldest, since = waiting[0], poll
        if waiting:
            longest = max(longest, poll - since)
        driver.poll()
    while waiting or running:
        for lease in list(waiting):
            if manager.ready(lease):
                manager.pin(lease)
                waiting.remove(lease)
                running[lease] = 0
        for lease in running:
            manager.release(lease)
        running.clear()
        driver.poll()
    assert started > 150
    assert longest <= LONGEST + PATIENCE + 8, "the oldest waited longer than the streams before it last"


def test_a_mix_gets_in_although_its_parts_are_wanted_alone(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    for number in range(6):
        write_adapter(tmp_path / f"a{number}", seed=number)
    driver = drive(max_slots=3)
    running = [driver.start(f"a{number}") for number in range(3)]
    mix = driver.request("a3", "a4", "a5")
    polls = 0
    while not driver.manager.ready(mix):
        polls += 1
        assert polls < 100
        younger = driver.request(f"a{polls % 3}")
        driver.poll()
        if driver.manager.ready(younger):
            driver.manager.pin(younger)
            running.append(younger)
        else:
            driver.end(younger)
        if polls % 2:
            driver.end(running.pop(0))
    driver.end(mix, *running)
