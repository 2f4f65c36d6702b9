"""Which versions are on the device: room for those that wait, in the order in which their requests came.

The oldest lease whose content is in host memory is the head. Least recently used idle adapters go for it. If those are
too few, adapters that are in use are closed: requests younger than the head wait, so that the users dwindle and the
head gets in, however many requests for other adapters keep coming. What older waiting requests need stays, unless the
head has been blocked for PATIENCE polls (they may be waiting for something else); what a head got stays for as many
polls, so that it can start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import takewhile

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.device.pool import PagePool
from lorry.adapters.device.slabs import Demand
from lorry.adapters.errors import AdapterError
from lorry.adapters.host import HostTier
from lorry.adapters.lease import Lease, Version

PATIENCE = 64


class Residency:
    """The device's side of the manager. evicted: called with each version that has just lost its slot."""

    def __init__(
        self, pool: PagePool, tier: HostTier, changed: Callable[[Version], None], evicted: Callable[[Version], None]
    ) -> None:
        self.pool = pool
        self.tier = tier
        self.evictions = 0
        self.host_evictions = 0
        self.by_slot: dict[int, Version] = {}
        self.hosted: dict[Version, None] = {}  # in host memory, without a slot, and somebody waits for them
        self.copy_seconds: list[float] = []
        self._filling: dict[Version, float] = {}  # since when
        self._closing: set[int] = set()
        self._head: Lease | None = None
        self._blocked = 0  # polls that the head has been blocked
        self._polls = 0
        self._polled = time.monotonic()
        self._grants: dict[Lease, int] = {}  # leases that got room: the poll at which it is open to others again
        self._changed = changed
        self._evicted = evicted

    @property
    def busy(self) -> bool:
        return bool(self._filling or self.hosted)

    def hosted_bytes(self) -> int:
        """Bytes in host memory that wait for room."""
        return sum(map(self.tier.size, self.hosted))

    def resident(self, lease: Lease) -> bool:
        """Whether all pages of all adapters of a lease are on the device."""
        return all(v.slot is not None and self.pool.is_resident(v.slot) for v in lease.versions())

    def ready(self, lease: Lease) -> bool:
        """Whether the lease may start now: resident, and not in the way of an older one."""
        if lease.pinned:
            return True
        if lease.absent:
            return False
        if self._head is None or lease.order <= self._head.order or lease in self._grants:
            return True
        return not any(version.slot in self._closing for version in lease.versions())

    def pin(self, lease: Lease) -> None:
        assert not lease.pinned and lease.error is None and self.resident(lease)
        for version in lease.versions():
            assert version.slot is not None
            self.pool.acquire(version.slot)
        lease.pinned = lease.started = True
        self._grants.pop(lease, None)

    def unpin(self, lease: Lease) -> None:
        self._grants.pop(lease, None)
        if lease.pinned:
            for version in lease.versions():
                assert version.slot is not None
                self.pool.release(version.slot)
            lease.pinned = False

    def host(self, version: Version, adapter: CanonicalAdapter) -> None:
        """A version's content is in host memory now."""
        self.tier.put(version, adapter)
        self.wait(version)

    def wait(self, version: Version) -> None:
        """Somebody asks for a version: what is in host memory only waits for room."""
        self.tier.touch(version)
        if version.host is not None and version.slot is None and version.leases:
            self.hosted[version] = None

    def idle(self, version: Version) -> None:
        """Nobody asks for a version any more: what it has may stay where it is."""
        self.tier.touch(version)
        self.hosted.pop(version, None)

    def drop(self, version: Version) -> None:
        """Forget a version's content, on the device and in host memory."""
        self._vacate(version)
        self.hosted.pop(version, None)
        self.tier.drop(version)

    def look(self, version: Version) -> None:
        """Whether all is there has changed for those that hold a version, or may have."""
        for lease in version.leases:
            lease.absent = lease.error is None and not self.resident(lease)

    def _vacate(self, version: Version) -> None:
        if version.slot is not None:
            self.pool.set_pinned(version.slot, False)
            self.pool.evict(version.slot)
            del self.by_slot[version.slot]
            self._closing.discard(version.slot)
            self._filling.pop(version, None)
            version.slot = None
            self.look(version)

    # ---------------------------------------------------------------- once a step

    def step(self, fail: Callable[[Lease, AdapterError], None]) -> None:
        """Copy, within the uploads' budget, and make room. `fail` ends leases that can never be resident."""
        self._let_in(fail)
        for version in self.tier.shed(self._needed):
            if version.slot is None:
                self.host_evictions += 1
                self._changed(version)

    def _needed(self, version: Version) -> bool:
        """Whether a version's content must stay in host memory."""
        if version.slot is None:
            return bool(version.leases)
        return not (self.pool.uploads.reads_back and self.pool.is_resident(version.slot))

    def _let_in(self, fail: Callable[[Lease, AdapterError], None]) -> None:
        self._polls += 1
        self._grants = {lease: end for lease, end in self._grants.items() if end > self._polls}
        now = time.monotonic()
        budget = self._fill(self.pool.uploads.budget(now - self._polled))
        self._polled = now
        while budget > 0:
            head = self._next_head()
            if head is not self._head:
                self._head, self._blocked = head, 0
            if head is None:
                self._closing.clear()
                return
            needed = [v for v in head.versions() if v.slot is None]
            demand = self._floor(head)
            if not self.pool.ever_fits(demand):
                fail(head, self.pool.too_small(demand))
            elif self._make_room(head, needed):
                self._closing.clear()
                self._grants[head] = self._polls + PATIENCE
                for version in needed:
                    self._reserve(version)
                budget = self._fill(budget)
            else:
                self._blocked += 1
                return

    def _fill(self, budget: int) -> int:
        """Go on with the copies, oldest first; what is left of the budget."""
        for version in list(self._filling):
            if budget <= 0:
                break
            assert version.slot is not None
            budget -= self.pool.fill(version.slot, budget)
            if self.pool.is_resident(version.slot):
                self.copy_seconds.append(time.monotonic() - self._filling.pop(version))
                self.look(version)
                self.pool.set_pinned(version.slot, version.entry.pinned and not version.retired)
                self._changed(version)
            elif self.pool.lacks_copies(version.slot):
                return 0  # nor is there room on the way for those of others
        return budget

    def _next_head(self) -> Lease | None:
        """The oldest lease that has all content and not all of it on the device."""
        complete = (
            next((lease for lease in version.leases if all(part.version.has_content for part in lease.parts)), None)
            for version in self.hosted
        )
        return min((lease for lease in complete if lease is not None), key=lambda lease: lease.order, default=None)

    def _floor(self, lease: Lease) -> Demand:
        """What the lease takes together with the pinned adapters, which never go."""
        versions = lease.versions()
        slots = {v.slot for v in versions if v.slot is not None}
        slots |= {slot for slot, v in self.by_slot.items() if v.entry.pinned and not v.retired}
        hosted = [v.host for v in versions if v.slot is None and v.host is not None]
        demands = [self.pool.demand(hosted), *(self.pool.demand_of(slot) for slot in slots)]
        return tuple(map(sum, zip(*demands, strict=True)))

    def _make_room(self, head: Lease, needed: list[Version]) -> bool:
        """Evict what may go; when that is too little, close what is in use."""
        demand = self.pool.demand(v.host for v in needed if v.host is not None)
        own = {v.slot for v in head.versions() if v.slot is not None}
        protected = own | self._slots_of(self._grants)
        if self._blocked < PATIENCE:
            came_before = lambda lease: lease.order < head.order
            older = (lease for v in self.by_slot.values() for lease in takewhile(came_before, v.leases))
            protected |= self._slots_of(lease for lease in older if not lease.pinned)
        victims = self.pool.make_room(demand, protected)
        if victims is None:
            others = [
                slot
                for slot in self.pool.least_recently_used()
                if slot not in own and not (self.by_slot[slot].entry.pinned and not self.by_slot[slot].retired)
            ]
            others.sort(key=lambda slot: slot not in self._closing)  # stable: whoever was closed stays so
            self._closing = set(self.pool.enough(demand, others) or ())  # (): first let copies end
            return False
        for slot in victims:
            if slot in self.by_slot:  # an eviction may have ended the last lease of another victim
                self._evict(self.by_slot[slot])
        return True

    @staticmethod
    def _slots_of(leases: Iterable[Lease]) -> set[int]:
        return {version.slot for lease in leases for version in lease.versions() if version.slot is not None}

    def _reserve(self, version: Version) -> None:
        assert version.host is not None
        version.slot = self.pool.reserve(version.host)
        version.slots = self.pool.all_slots(version.slot)
        del self.hosted[version]
        self.by_slot[version.slot] = version
        self._filling[version] = time.monotonic()
        self._changed(version)

    def _evict(self, version: Version) -> None:
        """Free a slot. Content that a preempted request has begun with goes back to host memory, never to disk."""
        assert version.slot is not None
        if version.started and version.host is None:
            self.tier.put(version, self.pool.extract(version.slot))
        self._vacate(version)
        self.evictions += 1
        if version.host is not None and version.leases:
            self.hosted[version] = None
        self._evicted(version)

    def check(self) -> None:
        """Prove that pool and versions agree."""
        self.pool.check()
        self.tier.check()
        assert set(self._filling) <= set(self.by_slot.values())
        assert self._closing <= set(self.by_slot)
        for slot, version in self.by_slot.items():
            assert version.slot == slot and version not in self.hosted
            pinned = sum(1 for lease in version.leases if lease.pinned)
            assert self.pool.users(slot) == pinned, "uses of a slot are not its pinned leases"
            assert version.host is not None or self.pool.uploads.reads_back
        assert all(v.host is not None and v.slot is None and v.leases for v in self.hosted)
