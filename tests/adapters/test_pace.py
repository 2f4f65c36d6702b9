"""Loads take their share of a core and no more, each of them in one thread; and whose share is which."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import NoBase

from lorry.adapters import library
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import Loader, load_adapter
from lorry.adapters.pace import LONGEST, SLICE, Pace
from lorry.adapters.reading.files import Place


class Clock:
    """Of one thread: what it has worked, and what it has slept."""

    def __init__(self) -> None:
        self.worked = 0.0
        self.pauses: list[float] = []

    def pace(self, share: float) -> Pace:
        pace = Pace(lambda: self.worked, self.pauses.append)
        pace.share = share
        pace.begin()
        return pace


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5, 0.9])
def test_the_share_is_kept_whatever_the_pieces(share: float) -> None:
    clock, rng = Clock(), random.Random(3)
    pace = clock.pace(share)
    for _ in range(3000):
        clock.worked += rng.choice([1e-6, 3e-4, SLICE, 1.7 * SLICE])
        pace.rest()
    assert clock.worked / (clock.worked + sum(clock.pauses)) == pytest.approx(share, rel=0.01)
    assert max(clock.pauses) <= LONGEST


def test_a_slice_is_not_interrupted_and_without_a_share_nothing_is() -> None:
    clock = Clock()
    pace = clock.pace(0.5)
    clock.worked += 0.9 * SLICE
    pace.rest()
    assert not clock.pauses
    clock.worked += 0.2 * SLICE
    pace.rest()
    assert clock.pauses == [pytest.approx(1.1 * SLICE)]
    pace.share = 1.0
    clock.worked += 100 * SLICE
    pace.rest()
    assert len(clock.pauses) == 1
    pace.share = 0.5
    pace.rest()
    assert len(clock.pauses) == 1, "what was done at full speed is not made up for"


def test_a_long_piece_has_a_bounded_pause() -> None:
    clock = Clock()
    pace = clock.pace(0.1)
    clock.worked += 60.0
    pace.rest()
    assert clock.pauses == [LONGEST]


def test_all_parts_of_a_load_rest(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    seen = set()

    def rest() -> None:
        frame = sys._getframe(1)
        seen.add(frame.f_code.co_name)

    load_adapter(Place(tmp_path / "a", (tmp_path,)), layout, torch.float32, NoBase(), rest=rest)
    assert seen == {"_fill", "revision_of", "read_linears", "canonicalise"}


def test_the_loader_computes_in_one_thread_and_leaves_others_theirs(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "a")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = Loader(layout, torch.float32, NoBase())
        found: list[int] = []
        load = loader._load
        monkeypatch.setattr(loader, "_load", lambda place: found.append(torch.get_num_threads()) or load(place))
        loader.submit(1, Place(tmp_path / "a", (tmp_path,)))
        loader.submit(2, Place(tmp_path / "a", (tmp_path,)), urgent=True)
        loader.close()
        assert {loaded.token for loaded in loader.results()} == {1, 2}
        assert found == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Shares(Loader):
    """Notes what it is told, and loads nothing until it may."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.may = threading.Event()
        self.told: list[float] = []

    def pace(self, share: float) -> None:
        self.told.append(share)

    def _run(self, token: int, place: Place) -> None:
        self.may.wait(60)
        super()._run(token, place)


@pytest.fixture
def shares(drive: Any, write_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Shares]:
    """A driver of four adapters, none of them read yet."""
    monkeypatch.setattr(library, "Loader", Shares)
    for number in range(4):
        write_adapter(tmp_path / f"a{number}", seed=number)
    driver = drive()
    loader = driver.manager._library._loader
    return driver, loader


def test_who_waits_decides_the_share(shares: tuple[Any, Shares], monkeypatch: pytest.MonkeyPatch) -> None:
    driver, loader = shares
    driver.manager.pin_adapter(1, "a0", True)
    driver.manager.poll(16)
    assert loader.told[-1] == library._SHARE_UNWAITED, "a command alone"
    waiting = [driver.request("a0")]
    driver.manager.poll(16)
    assert loader.told[-1] == library._SHARE_WAITED, "a request waits for the same content"
    waiting += [driver.request(f"a{number}") for number in (1, 2, 3)]
    driver.manager.poll(16)
    assert loader.told[-1] == library._SHARE_WAITED
    driver.manager.poll(5)
    assert loader.told[-1] == 4 / 5, "nearly as many wait as run"
    driver.manager.poll(3)
    assert loader.told[-1] == 1.0
    driver.end(*waiting)
    driver.manager.poll(16)
    assert loader.told[-1] == library._SHARE_UNWAITED
    driver.manager.poll(0)
    assert loader.told[-1] == 1.0, "nothing runs"
    with monkeypatch.context() as patch:
        patch.setattr(type(driver.manager.pool.uploads), "reads_back", False)
        driver.manager.poll(16)
        assert loader.told[-1] == 1.0, "the steps are a GPU's"
    loader.may.set()
    driver.until(lambda: 1 in driver.replies)
