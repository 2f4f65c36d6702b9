"""Adapters come and go on a GPU while steps read pages there. Run by `make test-gpu`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from random_adapters import adapter
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import Linear, ModelLayout
from lorry.kernels.lora import SITES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
LAYOUT = ModelLayout(layers=3, sites={"q_proj": (512, 512), "k_proj": (512, 96), "down_proj": (1536, 512)})
CAPACITY = 4 << 20  # of about 20 adapters
SLEEP = 300_000  # cycles that a step takes at least


class Steps:
    """Steps that read adapters through the tables, as kernels do, and count on the device what is wrong."""

    def __init__(self, pool: PagePool) -> None:
        self.pages = pool.pages
        self.wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self._counts = {size: torch.arange(size, device=DEVICE) for size in map(LAYOUT.page_elements, LAYOUT.sites)}

    def read(self, slot: int, content: dict[Linear, tuple[Tensor, float]]) -> None:
        for (layer, site), (expected, scaling) in content.items():
            column = SITES.index(site)
            count, size = expected.shape
            places = self.pages.offsets[slot, layer, column]
            found = self.pages.arena[places[:count, None] + self._counts[size]]
            self.wrong += (found != expected).sum()
            self.wrong += (places >= 0).sum() - count
            self.wrong += self.pages.scaling[slot, layer, column] != scaling


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Torch raises where it would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("budget", [20_000, 4 << 20])
def test_steps_read_whole_adapters_while_others_come_and_go(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(budget)
    adapters: list[CanonicalAdapter] = []
    for seed in range(24):
        linears = rng.sample(list(LAYOUT.linears()), rng.randint(1, 4))
        ranks = {linear: rng.choice([8, 16, 33]) for linear in linears}
        adapters.append(adapter(seed, ranks, layout=LAYOUT))
    on_device = [
        {key: (linear.pages.to(DEVICE), linear.scaling) for key, linear in item.linears.items()} for item in adapters
    ]
    pool = PagePool(LAYOUT, CAPACITY, device=DEVICE, max_slots=24)
    pool.pages.arena.fill_(torch.nan)
    moves: list[Tensor] = []
    move = pool.uploads.move
    monkeypatch.setattr(pool.uploads, "move", lambda target, source: (moves.append(target), move(target, source)))
    steps = Steps(pool)
    filling: dict[int, int] = {}
    resident: dict[int, int] = {}
    ends: list[torch.cuda.Event] = []
    waited = loads = 0
    torch.cuda.synchronize()
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    with no_synchronization():
        for turn in range(1500):
            if turn >= 2:
                ends[turn - 2].synchronize()  # two steps are under way, as in the engine
            left = budget
            for slot in list(filling):
                if left > 0:
                    left -= pool.fill(slot, left)
                if pool.is_resident(slot):
                    resident[slot] = filling.pop(slot)
                    loads += 1
                else:
                    waited += not pool.lacks_copies(slot)
            if len(filling) < 2:
                number = rng.randrange(len(adapters))
                for victim in pool.make_room(pool.demand([adapters[number]])) or []:
                    pool.evict(victim)
                    del resident[victim]
                if pool.make_room(pool.demand([adapters[number]])) == []:
                    filling[pool.reserve(adapters[number])] = number
            if rng.random() < 0.2:
                slot = rng.choice([*filling, *resident])
                pool.evict(slot)
                filling.pop(slot, None)
                resident.pop(slot, None)
            torch.cuda._sleep(SLEEP)
            for slot in rng.sample(sorted(resident), min(3, len(resident))):
                steps.read(slot, on_device[resident[slot]])
            end = torch.cuda.Event()
            end.record()
            ends.append(end)
    torch.cuda.synchronize()
    assert int(steps.wrong) == 0
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned, "no memory is pinned while serving"
    assert loads > 20 and waited > 20 and len(moves) > 20, "the test is too easy"
    pool.check()
    for slot, number in resident.items():
        saved = pool.extract(slot)
        assert all(torch.equal(saved.linears[key].pages, it.pages) for key, it in adapters[number].linears.items())


def test_what_is_inserted_is_there_at_once() -> None:
    pool = PagePool(LAYOUT, CAPACITY, device=DEVICE)
    steps = Steps(pool)
    for seed in range(20):
        item = adapter(seed, {(0, "q_proj"): 40, (2, "down_proj"): 64}, layout=LAYOUT)
        slot = pool.insert(item)
        assert slot is not None
        steps.read(slot, {key: (linear.pages.to(DEVICE), linear.scaling) for key, linear in item.linears.items()})
    assert int(steps.wrong) == 0
    pool.check()
