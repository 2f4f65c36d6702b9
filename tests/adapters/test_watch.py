"""What changes on disk while adapters are served: folders come, go and are written again."""

from __future__ import annotations

import os
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.catalog import Catalog
from lorry.adapters.errors import UnknownAdapter
from lorry.adapters.reading.files import Place
from lorry.adapters.records import AdapterState
from lorry.adapters.watch import Looks

State = AdapterState


TICK = 0.03  # seconds; the least difference of two times of files is below


@pytest.fixture
def write_adapter(write_adapter: Any) -> Any:
    """The same, at another time of files than whatever was before."""

    def write(*args: Any, **fields: Any) -> dict[str, Tensor]:
        time.sleep(TICK)
        content: dict[str, Tensor] = write_adapter(*args, **fields)
        return content

    return write


def ids(driver: Any) -> list[str]:
    return [info.id for info in driver.manager.list()]


def assert_serves(driver: Any, lease: Any, content: dict[str, Tensor]) -> None:
    row = content["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0]
    held = driver.held(lease.combo[0][0])[0, "q_proj"]
    assert torch.equal(held[0, : len(row)], row.to(held.dtype))


def test_two_looks_must_agree(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    catalog = Catalog(tmp_path)
    looks = Looks(catalog, catalog.scan().keys())
    assert looks.look([]).new == {} and looks.look([]).gone == []
    time.sleep(TICK)
    (tmp_path / "a").rename(tmp_path / "c")
    first, second, third = looks.look([]), looks.look([]), looks.look([])
    assert (first.new, first.gone) == ({}, [])
    assert (second.new, second.gone) == ({"c": Place(tmp_path / "c", (tmp_path,))}, ["a"])
    assert (third.new, third.gone) == ({}, [])


def test_a_folder_that_cannot_be_listed_takes_nobody_along(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    (folder / "a").mkdir(parents=True)
    catalog = Catalog(folder)
    looks = Looks(catalog, catalog.scan().keys())
    folder.rename(tmp_path / "away")
    assert all(looks.look([]).gone == [] for _ in range(3))
    (tmp_path / "away").rename(folder)
    assert all(looks.look([]).gone == [] for _ in range(3))


def test_a_folder_that_stays_is_not_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    catalog = Catalog(tmp_path)
    looks = Looks(catalog, ["a"])
    lists: list[int] = []
    listed = catalog.listed
    monkeypatch.setattr(catalog, "listed", lambda rest: lists.append(1) or listed(rest))
    for _ in range(5):
        looks.look([])
    assert len(lists) == 2
    time.sleep(TICK)
    (tmp_path / "b").mkdir()
    assert [list(looks.look([]).new) for _ in range(4)] == [[], ["b"], [], []]
    assert len(lists) == 4


def test_folders_come_and_go(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed=seed)
    driver = drive(host_memory=1 << 20)
    running = driver.start("a")
    driver.end(driver.start("b"))
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    content = write_adapter(tmp_path / "d", seed=7)
    driver.look()
    assert ids(driver) == ["a", "c", "d"], "a is in use"
    assert driver.manager.get("a").state is State.DRAINING
    assert {event.adapter.id for event in driver.events if event.removed} == {"b"}
    with pytest.raises(UnknownAdapter):
        driver.request("a")
    write_adapter(tmp_path / "a", seed=8)
    again = driver.start("a")  # another of the same name, while the first is still in use
    assert again.revisions != running.revisions
    driver.end(running, again)
    lease = driver.start("d")
    assert_serves(driver, lease, content)
    driver.end(lease)
    driver.settle()
    assert ids(driver) == ["a", "c", "d"]


def test_a_pinned_adapter_stays_without_its_folder(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    driver = drive()
    driver.manager.pin_adapter(1, "a", True)
    driver.answer(1)
    shutil.rmtree(tmp_path / "a")
    driver.look(3)
    driver.end(driver.start("a"))


def test_an_unloaded_folder_stays_unloaded_until_it_comes_anew(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    driver = drive()
    driver.manager.unload("a")
    driver.look(3)
    assert ids(driver) == []
    shutil.rmtree(tmp_path / "a")
    driver.look(3)
    write_adapter(tmp_path / "a", seed=1)
    driver.look(3)
    assert ids(driver) == ["a"]


def test_changed_files_are_a_new_revision_for_requests_that_come_afterwards(
    drive: Any, write_adapter: Any, tmp_path: Path
) -> None:
    one = write_adapter(tmp_path / "a", seed=1)
    driver = drive(host_memory=1 << 20)
    old = driver.start("a")
    two = write_adapter(tmp_path / "a", seed=2)
    driver.look()
    new = driver.start("a")
    assert new.revisions != old.revisions
    assert_serves(driver, old, one)
    assert_serves(driver, new, two)
    driver.end(old, new)
    driver.settle()
    assert driver.pool.bytes_used == driver.manager.get("a").bytes


def test_a_changed_adapter_in_host_memory_is_read_when_it_is_asked_for(
    drive: Any, write_adapter: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed=seed)
    driver = drive(max_slots=1, host_memory=1 << 20)
    revisions = []
    for name in "ab":
        lease = driver.start(name)
        revisions += lease.revisions
        driver.end(lease)
    content = write_adapter(tmp_path / "a", seed=7)
    driver.manager.take_counters()
    driver.look()
    assert driver.manager.get("a").state is State.REGISTERED
    assert driver.manager.take_counters().loads == {}
    lease = driver.start("a")
    assert lease.revisions[0] != revisions[0]
    assert_serves(driver, lease, content)
    driver.end(lease)


def test_what_is_being_written_is_left_alone(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", seed=1)
    driver = drive()
    lease = driver.start("a")
    driver.manager.take_counters()
    for seed in range(2, 6):
        write_adapter(tmp_path / "a", seed=seed)
        driver.look(1)
    assert driver.manager.take_counters().loads == {}
    driver.look(1)
    assert driver.manager.take_counters().loads == {"success": 1}
    driver.look(3)
    assert driver.manager.take_counters().loads == {}
    driver.end(lease)


def test_a_bad_change_changes_nothing_and_the_next_one_is_tried(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "a", seed=1)
    driver = drive(host_memory=1 << 20)
    lease = driver.start("a")
    time.sleep(TICK)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    driver.look(4)
    assert driver.manager.take_counters().loads == {"success": 1, "failure": 1}
    assert driver.manager.get("a").error and driver.manager.get("a").state is State.DEVICE
    same = driver.start("a")
    assert same.revisions == lease.revisions
    assert_serves(driver, same, one)
    two = write_adapter(tmp_path / "a", seed=2)
    driver.look()
    new = driver.start("a")
    assert_serves(driver, new, two)
    assert driver.manager.get("a").error == ""
    driver.end(lease, same, new)


def test_touched_files_are_no_new_revision(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    driver = drive()
    lease = driver.start("a")
    used = driver.pool.bytes_used
    time.sleep(TICK)
    os.utime(tmp_path / "a" / "adapter_config.json")
    driver.look(4)
    assert driver.manager.take_counters().loads == {"success": 2}, "read once more, and not again"
    again = driver.start("a")
    assert again.revisions == lease.revisions and driver.pool.bytes_used == used
    driver.end(lease, again)


def test_unload_while_a_change_is_read(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", seed=1)
    driver = drive()
    lease = driver.start("a")
    write_adapter(tmp_path / "a", seed=2)
    news = driver.manager._news
    driver.look(1)
    news._next = 0.0
    driver.until(lambda: news._refreshes)
    driver.manager.unload("a")
    driver.end(lease)
    driver.settle()
    assert ids(driver) == [] and driver.pool.bytes_used == 0


def test_a_replacement_by_command_counts_more_than_a_change(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", seed=1)
    mine = write_adapter(tmp_path / "mine", seed=3)
    driver = drive(host_memory=1 << 20)
    lease = driver.start("a")
    write_adapter(tmp_path / "a", seed=2)
    driver.look(1)
    news = driver.manager._news
    driver.manager.load(1, "a", "mine", replace=True)
    news._next = 0.0
    driver.until(lambda: news._refreshes)
    assert driver.answer(1).error is None
    driver.settle()
    new = driver.start("a")
    assert_serves(driver, new, mine)
    driver.end(lease, new)
    driver.settle()
    assert driver.manager.get("a").error == ""


def test_thousands_of_folders_come_in_parts(drive: Any, tmp_path: Path) -> None:
    driver = drive()
    for number in range(3000):
        (tmp_path / f"a{number:04d}").mkdir()
    known, told = [], []
    news = driver.manager._news
    news._next = 0.0
    while sum(told) < 3000:
        told.append(len(driver.manager.poll()))
        known.append(len(driver.manager._register.entries))
        if not news._watch.looking and not news.busy:
            news._next = 0.0
        time.sleep(0.0002)
    assert known[-1] == 3000
    assert max(b - a for a, b in pairwise(known)) <= 64 and max(told) <= 64
    pages, after = [], ""
    while page := driver.manager.list(after, 700):
        pages.append(len(page))
        after = page[-1].id
    assert pages == [700, 700, 700, 700, 200]
