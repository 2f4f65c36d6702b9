"""The life of adapters while requests use them: load, replace, unload, pin, change on disk, fail, mend."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters import loader
from lorry.adapters.errors import (
    AdapterExists,
    MalformedAdapter,
    MixRefused,
    PathRefused,
    PoolTooSmall,
    RevisionMismatch,
    UnknownAdapter,
    UnsupportedField,
    WrongBase,
)
from lorry.adapters.lease import Lease
from lorry.adapters.records import AdapterState
from lorry.kernels.lora import SITES

State = AdapterState


def assert_serves(driver: Any, lease: Lease, *contents: dict[str, Tensor]) -> None:
    """The pages of a pinned lease are those of the written tensors (the first row of each q_proj's A)."""
    pages = driver.pool.pages
    for (slot, _), tensors in zip(lease.combo, contents, strict=True):
        for layer in range(3):
            row = tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"][0]
            offset = int(pages.offsets[slot, layer, SITES.index("q_proj"), 0])
            assert torch.equal(pages.arena[offset : offset + len(row)], row.to(pages.arena.dtype))


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Loads begin, and end only after this event is set."""
    gate = threading.Event()
    read = loader.read_adapter

    def held(*args: Any) -> Any:
        assert gate.wait(60)
        return read(*args)

    monkeypatch.setattr(loader, "read_adapter", held)
    return gate


def test_a_request_loads_its_adapters_in_the_background(
    drive: Any, write_adapter: Any, tmp_path: Path, ref: Any, hold: threading.Event
) -> None:
    contents = [write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    driver = drive()
    assert [info.state for info in driver.manager.list()] == [State.REGISTERED] * 2
    lease = driver.request(ref("a", 0.5), ref("b", -2.0))
    driver.polls()
    assert not driver.manager.ready(lease) and driver.manager.busy
    assert driver.manager.get("a").state is State.LOADING
    assert (driver.manager.get("a").in_flight, driver.manager.get("a").revision) == (1, "")
    hold.set()
    driver.until(lambda: driver.manager.ready(lease))
    driver.manager.pin(lease)
    assert [weight for _, weight in lease.combo] == [0.5, -2.0]
    assert_serves(driver, lease, *contents)
    info = driver.manager.get("b")
    assert (info.state, info.rank, info.target_modules) == (State.DEVICE, 8, ("q_proj", "v_proj"))
    assert (info.revision, info.methods, info.error) == (lease.revisions[1], ("lora",), "")
    assert info.bytes == 3 * 16 * (37 + 43 + 37 + 15) * 2
    driver.end(lease)
    assert driver.manager.get("b").in_flight == 0
    driver.settle()
    counters = driver.manager.take_counters()
    assert (counters.loads, len(counters.load_seconds), counters.evictions) == ({"success": 2}, 2, 0)
    assert driver.manager.take_counters().loads == {}
    assert driver.manager.loaded() == 2


def test_requests_of_one_adapter_share_its_load(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    content = write_adapter(tmp_path / "a")
    driver = drive()
    leases = [driver.request("a") for _ in range(5)] + [driver.request("a", "a")]
    for lease in leases:
        driver.until(lambda lease=lease: driver.manager.ready(lease))
        driver.manager.pin(lease)
    assert {slot for lease in leases for slot, _ in lease.combo} == {leases[0].combo[0][0]}
    assert_serves(driver, leases[5], content, content)
    assert driver.manager.get("a").in_flight == 6
    assert driver.manager.take_counters().loads == {"success": 1}
    driver.end(*leases)


def test_the_base_needs_nothing(drive: Any) -> None:
    driver = drive(0)
    lease = driver.start()
    assert (lease.combo, lease.revisions) == ((), ())
    driver.end(lease)


def test_folders_are_noticed_later(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    driver = drive()
    with pytest.raises(UnknownAdapter, match="no adapter has the id 'later'") as unknown:
        driver.request("later")
    assert unknown.value.field == "later"
    write_adapter(tmp_path / "later")
    driver.end(driver.start("later"))
    write_adapter(tmp_path / "other")
    driver.look()
    assert [info.id for info in driver.manager.list()] == ["later", "other"]
    for name in ("", "..", "a/b", "x" * 65):
        with pytest.raises(UnknownAdapter):
            driver.request(name)


def test_a_failed_load_fails_those_that_wait_and_is_tried_again(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", use_bdlora=True)
    write_adapter(tmp_path / "b")
    driver = drive()
    waiting = [driver.request("a"), driver.request("b", "a")]
    for lease in waiting:
        with pytest.raises(UnsupportedField, match="use_bdlora"):
            driver.until(lambda lease=lease: driver.manager.ready(lease))
    info = driver.manager.get("a")
    assert info.state is State.FAILED and "use_bdlora" in info.error and info.in_flight == 0
    assert driver.manager.take_counters().loads["failure"] == 1
    driver.end(*waiting)
    content = write_adapter(tmp_path / "a", seed=7)
    lease = driver.start("a")
    assert_serves(driver, lease, content)
    assert driver.manager.get("a").error == ""
    driver.end(lease)


def test_a_load_that_nobody_waits_for_is_dropped(
    drive: Any, write_adapter: Any, tmp_path: Path, hold: threading.Event
) -> None:
    write_adapter(tmp_path / "a")
    driver = drive()
    lease = driver.request("a")
    driver.poll()
    driver.end(lease)
    hold.set()
    driver.settle()
    assert driver.manager.get("a").state is State.REGISTERED and driver.pool.bytes_used == 0
    driver.end(driver.start("a"))


def test_wrong_base_and_vanished_folders(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(8, 41)

    write_adapter(tmp_path / "a", edit=edit)
    write_adapter(tmp_path / "b")
    driver = drive()
    shutil.rmtree(tmp_path / "b")
    for name, error in (("a", WrongBase), ("b", MalformedAdapter)):
        lease = driver.request(name)
        with pytest.raises(error):
            driver.until(lambda lease=lease: driver.manager.ready(lease))
        driver.end(lease)


# ---------------------------------------------------------------- revisions


def test_a_change_on_disk_counts_from_the_next_reading(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "b", sites=SITES, rank=16)
    driver = drive(400_000, max_slots=1)
    first = driver.start("a")
    two = write_adapter(tmp_path / "a", seed=2)
    second = driver.start("a")
    assert second.revisions == first.revisions
    assert_serves(driver, second, one)
    before = first.revisions
    driver.end(first, second)
    driver.end(driver.start("b"))  # evicts a
    third = driver.start("a")
    assert third.revisions != before
    assert_serves(driver, third, two)
    driver.end(third)


def test_a_preempted_request_goes_on_with_what_it_began_with(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "b")
    driver = drive(max_slots=1)
    lease = driver.start("a")
    revisions = lease.revisions
    driver.manager.unpin(lease)
    driver.end(driver.start("b"))
    write_adapter(tmp_path / "a", seed=2)
    assert driver.manager.get("a").state in (State.HOST, State.LOADING, State.DEVICE)
    driver.until(lambda: driver.manager.ready(lease))
    driver.manager.pin(lease)
    assert lease.revisions == revisions
    assert_serves(driver, lease, one)
    driver.end(lease)


def test_an_activated_lora_keeps_its_invocation_tokens(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", alora_invocation_tokens=[5, 9])
    write_adapter(tmp_path / "b")
    driver = drive(max_slots=1)
    lease = driver.request("a")
    assert lease.invocation_tokens == ()
    driver.until(lambda: driver.manager.ready(lease))
    driver.manager.pin(lease)
    assert lease.invocation_tokens == (5, 9)
    assert driver.manager.get("a").methods == ("lora", "alora")
    driver.manager.unpin(lease)
    plain = driver.start("b")  # evicts a, whose content is kept for its lease
    assert plain.invocation_tokens == ()
    driver.end(plain)
    driver.until(lambda: driver.manager.ready(lease))
    assert lease.invocation_tokens == (5, 9)
    driver.end(lease)
    driver.end(driver.start("b"))
    write_adapter(tmp_path / "a", alora_invocation_tokens=[6])
    later = driver.start("a")
    assert later.invocation_tokens == (6,)
    driver.end(later)


def test_an_activated_lora_is_refused_in_a_mix_as_soon_as_it_is_known(
    drive: Any, write_adapter: Any, tmp_path: Path, ref: Any
) -> None:
    write_adapter(tmp_path / "a", alora_invocation_tokens=[5, 9])
    write_adapter(tmp_path / "b")
    write_adapter(tmp_path / "c", alora_invocation_tokens=[5])
    write_adapter(tmp_path / "d", seed=3)
    driver = drive()
    unread = [driver.request("b", "a"), driver.request("c", "a")]
    for lease in unread:
        with pytest.raises(MixRefused, match=r"adapters: [ac] is an activated LoRA") as late:
            driver.until(lambda lease=lease: driver.manager.ready(lease))
        assert late.value.field == "adapters"
    driver.end(*unread)
    alone = driver.start(ref("a", -0.5))
    assert [weight for _, weight in alone.combo] == [-0.5]
    with pytest.raises(MixRefused, match="adapters: a is"):
        driver.request("a", "d")
    waiting = driver.start("b", "d")  # not yet replaced
    driver.manager.load(1, "d", "c", replace=True)
    assert driver.answer(1).error is None
    with pytest.raises(MixRefused, match="adapters: d is"):
        driver.request("b", "d")
    driver.end(alone, waiting)


def test_requests_may_insist_on_a_revision(drive: Any, write_adapter: Any, tmp_path: Path, ref: Any) -> None:
    write_adapter(tmp_path / "a", seed=1)
    driver = drive()
    wrong = driver.request(ref("a", revision="0" * 64))
    with pytest.raises(RevisionMismatch) as early:
        driver.until(lambda: driver.manager.ready(wrong))
    driver.end(wrong)
    lease = driver.start("a")
    assert early.value.details == {"expected": "0" * 64, "actual": lease.revisions[0]}
    driver.end(driver.start(ref("a", revision=lease.revisions[0])))
    with pytest.raises(RevisionMismatch):
        driver.request(ref("a", revision="0" * 64))
    driver.end(lease)


# ---------------------------------------------------------------- commands


def test_load_registers_and_answers_when_resident(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    content = write_adapter(tmp_path / "deep" / "folder")
    driver = drive()
    driver.manager.load(1, "mine", "deep/folder")
    lease = driver.request("mine")
    reply = driver.answer(1)
    assert reply.error is None and reply.adapter.state is State.DEVICE and not reply.adapter.pinned
    driver.until(lambda: driver.manager.ready(lease))
    driver.manager.pin(lease)
    assert_serves(driver, lease, content)
    driver.end(lease)
    with pytest.raises(AdapterExists):
        driver.manager.load(2, "mine", "deep/folder")
    assert [(event.adapter.state, event.removed) for event in driver.events if event.adapter.id == "mine"][-1] == (
        State.DEVICE,
        False,
    )


def test_load_refuses_ids_paths_and_contents(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "bad", use_bdlora=True)
    write_adapter(tmp_path / "good")
    driver = drive()
    manager = driver.manager
    for name in ("", "a/b", ".."):
        with pytest.raises(MalformedAdapter, match="id is"):
            manager.load(1, name, "good")
    with pytest.raises(AdapterExists, match="base model's name"):
        manager.load(1, "tiny-base", "good")
    for path in ("../x", "/etc", "nowhere"):
        with pytest.raises(PathRefused):
            manager.load(1, "new", path)
    manager.load(1, "new", "bad")
    assert isinstance(driver.answer(1).error, UnsupportedField)
    manager.load(2, "new", "good", expected_revision="1" * 64)
    assert isinstance(driver.answer(2).error, RevisionMismatch)
    driver.settle()
    assert [info.id for info in manager.list()] == ["bad", "good"], "a refused id is not registered"
    assert any(event.removed and event.adapter.id == "new" for event in driver.events)
    manager.load(3, "new", "good")
    assert driver.answer(3).error is None


def test_load_warms_a_registered_folder(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "b")
    driver = drive()
    with pytest.raises(AdapterExists):
        driver.manager.load(1, "a", "b")
    driver.manager.load(2, "a", "a")
    assert driver.answer(2).adapter.state is State.DEVICE


def test_replace_lets_streams_finish_on_the_old_revision(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "a", seed=1), write_adapter(tmp_path / "v2", seed=2, rank=20)
    driver = drive()
    old = driver.start("a")
    waiting = driver.request("a")
    driver.manager.load(1, "a", "v2", replace=True)
    during = driver.request("a")
    reply = driver.answer(1)
    assert reply.adapter.rank == 20 and reply.adapter.revision != old.revisions[0]
    new = driver.start("a")
    assert_serves(driver, old, one)
    assert_serves(driver, new, two)
    for lease in (waiting, during):
        driver.until(lambda lease=lease: driver.manager.ready(lease))
        driver.manager.pin(lease)
        assert_serves(driver, lease, one)
    assert driver.manager.get("a").in_flight == 4
    both = driver.pool.bytes_used
    driver.end(old, waiting, during)
    assert driver.pool.bytes_used < both
    assert driver.pool.bytes_used == driver.manager.get("a").bytes
    assert_serves(driver, new, two)
    driver.end(new)


def test_a_refused_replacement_changes_nothing(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "v2", seed=2)
    (tmp_path / "v2" / "adapter_model.safetensors").write_bytes(b"nothing")
    driver = drive()
    old = driver.start("a")
    driver.manager.load(1, "a", "v2", replace=True)
    assert isinstance(driver.answer(1).error, MalformedAdapter)
    write_adapter(tmp_path / "v2", seed=2)
    driver.manager.load(2, "a", "v2", replace=True, expected_revision="2" * 64)
    assert isinstance(driver.answer(2).error, RevisionMismatch)
    new = driver.start("a")
    assert new.revisions == old.revisions and driver.manager.get("a").state is State.DEVICE
    assert_serves(driver, new, one)
    driver.end(old, new)


def test_replace_by_the_same_content_is_no_change(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "v2", seed=1)
    driver = drive()
    lease = driver.start("a")
    used = driver.pool.bytes_used
    driver.manager.load(1, "a", "v2", replace=True)
    assert driver.answer(1).adapter.revision == lease.revisions[0]
    assert driver.pool.bytes_used == used
    driver.end(lease)


def test_replace_in_a_pool_for_one(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    """The replacement waits for the streams on the old revision; requests that come meanwhile get the new one."""
    one, two = write_adapter(tmp_path / "a", seed=1), write_adapter(tmp_path / "v2", seed=2)
    driver = drive(max_slots=1)
    old = driver.start("a")
    driver.manager.load(1, "a", "v2", replace=True)
    driver.until(lambda: driver.manager.get("a").state is State.HOST)
    later = driver.request("a")
    driver.polls()
    assert 1 not in driver.replies and not driver.manager.ready(later)
    assert_serves(driver, old, one)
    driver.end(old)
    assert driver.answer(1).error is None
    driver.until(lambda: driver.manager.ready(later))
    driver.manager.pin(later)
    assert_serves(driver, later, two)
    driver.end(later)


def test_unload_drains(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    content = write_adapter(tmp_path / "a")
    driver = drive()
    running, waiting = driver.start("a"), driver.request("a")
    assert driver.manager.unload("a").state is State.DRAINING
    for call in (lambda: driver.request("a"), lambda: driver.manager.unload("a")):
        with pytest.raises(UnknownAdapter):
            call()
    assert driver.manager.get("a").in_flight == 2
    assert_serves(driver, running, content)
    driver.end(running)
    driver.until(lambda: driver.manager.ready(waiting))
    driver.manager.pin(waiting)
    assert_serves(driver, waiting, content)
    driver.end(waiting)
    driver.settle()
    assert driver.pool.bytes_used == 0 and driver.manager.list() == []
    assert driver.events[-1].removed
    with pytest.raises(UnknownAdapter):
        driver.request("a")  # the folder is still there, but was unloaded
    driver.manager.load(1, "a", "a")
    assert driver.answer(1).error is None


def test_unload_of_what_is_idle_or_loading(
    drive: Any, write_adapter: Any, tmp_path: Path, hold: threading.Event
) -> None:
    write_adapter(tmp_path / "a")
    driver = drive()
    driver.manager.load(1, "b", "a")
    waiting = driver.request("b")
    driver.poll()
    assert driver.manager.unload("b").state is State.DRAINING
    assert isinstance(driver.answer(1).error, UnknownAdapter)
    driver.manager.load(2, "b", "a")  # the id is free again while the old one drains
    hold.set()
    assert driver.answer(2).error is None
    driver.until(lambda: driver.manager.ready(waiting))
    driver.end(waiting)
    assert driver.manager.unload("b").state is State.REGISTERED
    assert driver.manager.unload("a").bytes == 0
    driver.settle()
    assert driver.pool.bytes_used == 0 and driver.manager.list() == []


def test_pins_keep_an_adapter_and_bring_it(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed=seed)
    driver = drive(max_slots=2)
    driver.manager.pin_adapter(1, "a", True)
    assert driver.answer(1).adapter.pinned
    for name in "bcbc":
        driver.end(driver.start(name))
    assert driver.manager.get("a").state is State.DEVICE
    blocked = driver.request("b", "c")  # can never be resident beside the pinned one
    with pytest.raises(PoolTooSmall, match="pinned"):
        driver.until(lambda: driver.manager.ready(blocked))
    driver.end(blocked)
    driver.manager.pin_adapter(2, "a", False)
    assert not driver.answer(2).adapter.pinned
    driver.end(driver.start("b", "c"))
    assert driver.manager.get("a").state is State.REGISTERED
    with pytest.raises(UnknownAdapter):
        driver.manager.pin_adapter(3, "nobody", True)


def test_a_pin_passes_to_the_replacement(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "b", seed=2)
    write_adapter(tmp_path / "v2", seed=3)
    driver = drive(max_slots=2)
    driver.manager.load(1, "x", "a", pin=True)
    driver.answer(1)
    driver.manager.load(2, "x", "v2", replace=True)
    assert driver.answer(2).adapter.pinned
    for name in ("a", "b", "v2", "a"):
        driver.end(driver.start(name))
    assert driver.manager.get("x").state is State.DEVICE


def test_a_fetched_folder_is_held_to_the_revision_in_its_name(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    """It lies outside the roots; what goes of it is read again, unless it is damaged by then."""
    content = write_adapter(tmp_path / "known")
    driver = drive()
    driver.end(driver.start("known"))
    revision = driver.manager.get("known").revision
    folder = tmp_path.parent / f"{tmp_path.name}-store" / revision
    folder.parent.mkdir()
    shutil.copytree(tmp_path / "known", folder)
    driver.manager.load(1, "a", "hf://org/name", fetched=str(folder), expected_revision="0" * 64)
    assert isinstance(driver.answer(1).error, RevisionMismatch)
    driver.manager.load(2, "a", "hf://org/name", fetched=str(folder))
    assert driver.answer(2).adapter.revision == revision
    lease = driver.start("a")
    assert_serves(driver, lease, content)
    driver.end(lease)
    write_adapter(folder, seed=1)
    driver.manager.load(3, "b", "hf://org/name", fetched=str(folder))
    error = driver.answer(3).error
    assert isinstance(error, MalformedAdapter) and "damaged by now: load it again" in error.message
