"""Adapter folders written by hand, and a manager that is polled until something has come about."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.device.uploads import Beside
from lorry.adapters.layout import Linear, ModelLayout
from lorry.adapters.lease import Lease
from lorry.adapters.manager import AdapterManager
from lorry.adapters.records import AdapterChanged, AdapterReply
from lorry.kernels.lora import SITES

sys.path.insert(0, str(Path(__file__).parent))  # random_adapters.py and fake_device.py serve several tests here

from fake_device import FakeDevice
from random_adapters import NoBase

PATIENCE = 60.0  # seconds; only a hang takes that long


@pytest.fixture(scope="session")
def layout() -> ModelLayout:
    """Three layers, every dimension another odd number."""
    sites = {
        "q_proj": (37, 43),
        "k_proj": (37, 13),
        "v_proj": (37, 15),
        "o_proj": (43, 37),
        "gate_proj": (37, 57),
        "up_proj": (37, 59),
        "down_proj": (59, 37),
    }
    return ModelLayout(layers=3, sites=sites, base="tiny-base")


@dataclass(frozen=True)
class Ref:
    """A request's reference to an adapter."""

    id: str
    weight: float = 1.0
    revision: str | None = None


@pytest.fixture(scope="session")
def ref() -> type[Ref]:
    return Ref


Writer = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def write_adapter(layout: ModelLayout) -> Writer:
    """write_adapter(folder, sites=…, rank=…, seed=…, dtype=…, edit=…, **config): a PEFT folder; returns its tensors.

    `edit` may change the dict of tensors before it is written.
    """

    def write(
        folder: Path,
        sites: tuple[str, ...] = ("q_proj", "v_proj"),
        rank: int = 8,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        edit: Callable[[dict[str, Tensor]], object] | None = None,
        **config: Any,
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer, site in layout.linears():
            if site in sites:
                in_features, out_features = layout.sites[site]
                name = f"base_model.model.{layout.module_path(layer, site)}"
                a, b = (torch.randn(*s, generator=generator) for s in ((rank, in_features), (out_features, rank)))
                tensors |= {f"{name}.lora_A.weight": a.to(dtype), f"{name}.lora_B.weight": b.to(dtype)}
        if edit is not None:
            edit(tensors)
        base = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**base, "target_modules": list(sites), **config})
        (folder / "adapter_config.json").write_text(content)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
        return tensors

    return write


class Driver:
    """A manager over `folder`, whose polls are recorded and whose invariants are proved after each.

    lagging: its pool is on a device that does little between two polls.
    """

    def __init__(
        self,
        layout: ModelLayout,
        folder: Path,
        capacity: int,
        lagging: bool = False,
        host_memory: int = 0,
        **pool: Any,
    ) -> None:
        self.device = FakeDevice()
        if lagging:
            ring = self.device.pin(torch.zeros(1 << 14, dtype=torch.uint8))
            pool["uploads"] = Beside(self.device.steps, self.device.copies, ring)
        self.pool = PagePool(layout, capacity, **pool)
        self.pool.pages.arena.fill_(torch.nan)
        self.manager = AdapterManager(Catalog(folder), self.pool, NoBase(), host_memory)
        self.events: list[AdapterChanged] = []
        self.replies: dict[int, AdapterReply] = {}

    def poll(self) -> None:
        for event in self.manager.poll():
            if isinstance(event, AdapterReply):
                self.replies[event.call_id] = event
            else:
                self.events.append(event)
        for _ in range(9):
            self.device.copies.advance()
        self.check()

    def check(self) -> None:
        self.device.end_steps()
        self.manager.check()

    def held(self, slot: int) -> dict[Linear, Tensor]:
        """Pages [P, 16·(K+N)] of each linear, where the tables lead."""
        self.device.end_steps()
        layout, pages = self.pool.layout, self.pool.pages
        found = {}
        for layer, site in layout.linears():
            places = [place for place in pages.offsets[slot, layer, SITES.index(site)].tolist() if place >= 0]
            if places:
                size = layout.page_elements(site)
                found[layer, site] = torch.stack([pages.arena[place : place + size] for place in places])
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "what was waited for did not come about"
            self.poll()
            time.sleep(0.0005)

    def settle(self) -> None:
        """Poll until nothing is under way."""
        self.until(lambda: not self.manager.busy)

    def look(self, times: int = 2) -> None:
        """Poll until so many looks at the disk are over and what they saw is known."""
        news = self.manager._news
        for _ in range(times):
            time.sleep(0.02)  # more than the least difference of two times of files
            news._next = 0.0
            self.until(lambda: news._watch.looking)
            self.until(lambda: not news._watch.looking and not news.busy)

    def polls(self, count: int = 20) -> None:
        for _ in range(count):
            self.poll()
            time.sleep(0.0005)

    def request(self, *refs: Ref | str) -> Lease:
        lease = self.manager.request([Ref(item) if isinstance(item, str) else item for item in refs])
        self.check()
        return lease

    def start(self, *refs: Ref | str) -> Lease:
        """A pinned lease."""
        lease = self.request(*refs)
        self.until(lambda: self.manager.ready(lease))
        self.manager.pin(lease)
        self.check()
        return lease

    def end(self, *leases: Lease) -> None:
        for lease in leases:
            self.manager.release(lease)
            self.check()

    def answer(self, call_id: int) -> AdapterReply:
        self.until(lambda: call_id in self.replies)
        return self.replies.pop(call_id)


@pytest.fixture
def drive(layout: ModelLayout, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """drive(capacity, **pool): a Driver over tmp_path."""
    drivers = []

    def make(capacity: int = 1 << 20, **pool: Any) -> Driver:
        drivers.append(Driver(layout, tmp_path, capacity, **pool))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.manager.close()
