"""Host memory: what was checked comes back from there, as far as the bytes go, least recently asked for first to go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.adapters.records import AdapterState
from lorry.kernels.lora import SITES

State = AdapterState
EACH = 3 * 16 * (37 + 43 + 37 + 15) * 2  # bytes of a written adapter


@pytest.fixture
def names(write_adapter: Any, tmp_path: Path) -> str:
    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / name, seed=seed)
    return "abcd"


def loads(driver: Any) -> int:
    return sum(driver.manager.take_counters().loads.values())


def in_host_memory(driver: Any) -> str:
    return "".join(info.id for info in driver.manager.list() if info.state is State.HOST)


@pytest.mark.parametrize("lagging", [False, True])
def test_what_was_evicted_comes_back_without_the_disk(drive: Any, names: str, tmp_path: Path, lagging: bool) -> None:
    driver = drive(max_slots=1, host_memory=4 * EACH, lagging=lagging)
    revisions = {}
    for name in names:
        lease = driver.start(name)
        revisions[name] = lease.revisions
        driver.end(lease)
    assert loads(driver) == 4
    for name in "abc":
        (tmp_path / name / "adapter_model.safetensors").unlink()
    assert in_host_memory(driver) == "abc" and driver.manager.get("d").state is State.DEVICE
    for name in names:
        lease = driver.start(name)
        assert lease.revisions == revisions[name]
        assert len(driver.held(lease.combo[0][0])) == 6
        driver.end(lease)
    assert loads(driver) == 0


def test_where_adapters_are_is_told(drive: Any, names: str) -> None:
    driver = drive(max_slots=2, host_memory=3 * EACH)
    for name in "abca":
        driver.end(driver.start(name))
    driver.settle()
    tiers = driver.manager.tiers()
    assert tiers.adapters == {"device": 2, "host": 1, "disk": 1} and tiers.on_device == ("a", "c")
    assert tiers.bytes == {"device": 2 * EACH, "host": 3 * EACH}
    driver.end(driver.request("a", "b", "d"))
    counters = driver.manager.take_counters()
    assert counters.found == {"disk": 4, "host": 2, "device": 1}
    assert len(counters.copy_seconds) == 4 and counters.evictions == 2


def test_the_one_asked_for_longest_ago_goes_first(drive: Any, names: str) -> None:
    driver = drive(max_slots=1, host_memory=3 * EACH)
    for name in names:
        driver.end(driver.start(name))
    driver.settle()
    assert in_host_memory(driver) == "bc", "with d, which is on the device too, three"
    assert driver.manager.take_counters().host_evictions == 1
    driver.end(driver.start("b"))
    driver.end(driver.start("a"))
    driver.settle()
    assert in_host_memory(driver) == "bd"
    assert driver.manager.take_counters().host_evictions == 1


def test_a_content_counts_once(drive: Any, names: str) -> None:
    """Where the pool keeps the pages of what is on the device in host memory, these are the same, and stay."""
    driver = drive(max_slots=2, host_memory=3 * EACH, lagging=True)
    for name in names:
        driver.end(driver.start(name))
    driver.settle()
    tier = driver.manager._library.tier
    assert tier.bytes == 3 * EACH and in_host_memory(driver) == "b"
    for slot, version in driver.manager._library.residency.by_slot.items():
        assert driver.pool.extract(slot) is version.host
    none = drive(max_slots=2, lagging=True)
    for name in names:
        none.end(none.start(name))
    none.settle()
    assert in_host_memory(none) == "" and none.manager._library.tier.bytes == 2 * EACH


def test_a_load_that_nobody_waits_for_any_more_is_kept(drive: Any, names: str) -> None:
    driver = drive(host_memory=EACH)
    lease = driver.request("a")
    driver.poll()
    driver.end(lease)
    driver.settle()
    assert driver.manager.get("a").state is State.HOST and driver.pool.bytes_used == 0
    driver.end(driver.start("a"))
    assert loads(driver) == 1


def test_what_is_waited_for_stays_whatever_it_takes(drive: Any, names: str) -> None:
    driver = drive(2 * EACH, max_slots=1, host_memory=EACH)
    running = driver.start("a")
    waiting = [driver.request(name) for name in "bc"]
    driver.until(lambda: in_host_memory(driver) == "bc")
    driver.polls(5)
    assert in_host_memory(driver) == "bc"
    driver.end(running, *waiting)
    driver.settle()
    assert in_host_memory(driver) == "c"


def test_replaced_and_unloaded_contents_leave_nothing(
    drive: Any, names: str, write_adapter: Any, tmp_path: Path
) -> None:
    driver = drive(max_slots=1, host_memory=1 << 20)
    for name in "ab":
        driver.end(driver.start(name))
    old = driver.manager.get("a").revision
    write_adapter(tmp_path / "new", sites=SITES, seed=7)
    driver.manager.load(1, "a", "new", replace=True)
    assert driver.answer(1).adapter.revision != old
    driver.manager.unload("b")
    driver.settle()
    assert driver.manager._library.tier.bytes == driver.manager.get("a").bytes
    driver.manager.unload("a")
    driver.settle()
    assert driver.manager._library.tier.bytes == 0


def test_a_load_by_name_reads_again(drive: Any, names: str, write_adapter: Any, tmp_path: Path) -> None:
    driver = drive(max_slots=1, host_memory=1 << 20)
    for name in "ab":
        driver.end(driver.start(name))
    old = driver.manager.get("a").revision
    content = write_adapter(tmp_path / "a", seed=9)
    driver.manager.load(1, "a", "a")
    assert driver.answer(1).adapter.revision != old
    lease = driver.start("a")
    row = content["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0]
    held = driver.held(lease.combo[0][0])[0, "q_proj"]
    assert torch.equal(held[0, : len(row)], row.to(held.dtype))
    driver.end(lease)
