"""The contents behind the entries: what is read from disk, what replaces what, what goes.

Version life:   known ─want─▶ loading ─▶ in host memory ─(residency)─▶ on the device ─evict─▶ known
                candidate ─▶ loaded ─promote─▶ current ─retire─▶ kept for its leases ─settle─▶ gone
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.errors import AdapterError, MixRefused, RevisionMismatch
from lorry.adapters.host import HostTier
from lorry.adapters.lease import Entry, Lease, Part, Version
from lorry.adapters.loader import Loaded, Loader
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.records import DEVICE, DISK, HOST, Counters
from lorry.adapters.register import Register
from lorry.adapters.residency import Residency

_SHARE_WAITED = 0.8  # of a core for a load that a request waits for, while sequences run
_SHARE_UNWAITED = 0.07  # for one that only a command waits for, or a change on disk
_READS_AHEAD = 2  # handed to the loader at a time; later ones stay open to reordering


def unfit(part: Part, parts: Sequence[Part]) -> AdapterError | None:
    """Why one of a lease's parts, whose content is known, cannot serve it.

    It is not the revision that the request insists on; an activated LoRA in a mix, which acts from some token on; or
    one with gains or biases of its own, of which there is no multiple, in a mix or with a weight.
    """
    wanted, actual = part.wanted, part.version.revision
    name = part.version.entry.id
    if wanted is not None and wanted != actual:
        message = f"the adapter {name} has revision {actual}, not {wanted[:64]!r}"
        return RevisionMismatch(message, name, expected=wanted[:64], actual=actual)
    if part.version.invocation_tokens and len(parts) > 1:
        message = f"adapters: {name} is an activated LoRA (alora_invocation_tokens), which is served alone, in no mix"
        return MixRefused(message, "adapters")
    if not part.version.additive and (len(parts) > 1 or part.weight != 1):
        methods = ", ".join(part.version.methods)
        return MixRefused(f"adapters: {name} ({methods}) is served alone and with weight 1, in no mix", "adapters")
    return None


class Library:
    """Leases and loads; the entries are in `register`, the device's side in `residency`."""

    def __init__(self, catalog: Catalog, pool: PagePool, base: BaseWeights, host_memory: int) -> None:
        self.pool = pool
        self.register = Register(catalog, pool)
        self.tier = HostTier(host_memory)
        self.residency = Residency(pool, self.tier, lambda version: self.register.touch(version.entry), self._lost)
        self.counters = Counters()
        self._loader = Loader(pool.layout, pool.dtype, base)
        self._to_load: dict[Version, None] = {}
        self._reading: dict[int, Version] = {}
        self._tokens = itertools.count()
        self._orders = itertools.count()

    def close(self) -> None:
        self._loader.close()

    @property
    def busy(self) -> bool:
        return bool(self._to_load or self._reading or self.register.busy or self.residency.busy)

    # ---------------------------------------------------------------- leases

    def lease(self, parts: Sequence[Part], internal: bool = False) -> Lease:
        """A lease whose missing contents are asked for."""
        lease = Lease(next(self._orders), parts, internal)
        for version in lease.versions():
            if not internal:
                tier = self._tier_of(version)
                self.counters.found[tier] = self.counters.found.get(tier, 0) + 1
            version.leases[lease] = None
            self._want(version)
        lease.absent = not self.residency.resident(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Take a lease off its versions; what nobody holds any more goes."""
        self.residency.unpin(lease)
        for version in lease.versions():
            version.leases.pop(lease, None)
            self._settle(version)

    def fail(self, lease: Lease, error: AdapterError) -> None:
        """The lease can never be ready; whoever asks is told."""
        lease.error, lease.absent = error, False
        self.release(lease)

    def _tier_of(self, version: Version) -> str:
        if version.slot is not None and self.pool.is_resident(version.slot):
            return DEVICE
        return HOST if version.has_content else DISK

    # ---------------------------------------------------------------- loads

    def start_loads(self, running: int = 0) -> None:
        """Hand the contents that the oldest leases wait for to the loader.

        Urgently, and without a pause, when they are as many as there are sequences running: these are then not slower
        than all together would be. 16 streams of 200 adapters, room for 16, other processes on both cores: 50 → 79
        tokens/s, 47 → 77.

        What waits for room in host memory comes to the pool's size at most; beyond that, only what the oldest of all
        waiting leases lacks is read.
        """
        self._loader.pace(self._share(running))
        while self._to_load and len(self._reading) < _READS_AHEAD:
            urgent = len(self._to_load) + len(self._reading) >= running
            version = min(self._to_load, key=_oldest)
            hosted = min(map(_oldest, self.residency.hosted), default=_oldest(version))
            if self.residency.hosted_bytes() >= self.pool.capacity_bytes and _oldest(version) > hosted:
                return
            del self._to_load[version]
            token = next(self._tokens)
            self._reading[token] = version
            self._loader.submit(token, version.place, urgent)

    def _share(self, running: int) -> float:
        """Of a core for loads: all where nothing runs, or when requests wait for as many as there are sequences.

        On a GPU all of it too: there the forward pass waits for no core.
        """
        under_way = [*self._reading.values(), *self._to_load]
        if not running or not under_way or not self.pool.uploads.reads_back:
            return 1.0
        waited = sum(any(not lease.internal for lease in version.leases) for version in under_way)
        return min(1.0, max(_SHARE_WAITED, waited / running)) if waited else _SHARE_UNWAITED

    def end_loads(self) -> None:
        """Take what the loader has finished."""
        for loaded in self._loader.results():
            version = self._reading.pop(loaded.token)
            version.loading, version.files = False, loaded.files
            result = "success" if loaded.error is None else "failure"
            self.counters.loads[result] = self.counters.loads.get(result, 0) + 1
            self.counters.load_seconds.append(loaded.seconds)
            self._end_load(version, loaded)
            self.register.touch(version.entry)

    def _end_load(self, version: Version, loaded: Loaded) -> None:
        entry = version.entry
        if version.replaces not in (None, entry.current):
            for lease in list(version.leases):
                self.fail(lease, AdapterError("the adapter was replaced meanwhile", entry.id))
            return
        entry.error = loaded.error.message if loaded.error is not None else ""
        if loaded.adapter is not None:
            version.describe(loaded.adapter)
        for lease in list(version.leases):
            error = loaded.error or _unfit(lease, version)
            if error is not None:
                self.fail(lease, error)
        if version.leases and loaded.adapter is not None:
            self._keep(version, loaded.adapter)
            entry.provisional = False
        elif entry.provisional:
            self.register.remove(entry)
        elif loaded.adapter is not None and version is entry.current and not version.retired:
            self.residency.host(version, loaded.adapter)  # nobody waits for it any more

    def _keep(self, version: Version, adapter: CanonicalAdapter) -> None:
        current = version.entry.current
        same = current.revision == version.revision and current.has_content and not current.retired
        if version.candidate and same:
            current.place, current.files = version.place, version.files
            self._transfer(version, current)
            return
        self.residency.host(version, adapter)
        if version.candidate:
            self._promote(version)

    def _want(self, version: Version) -> None:
        self.residency.wait(version)
        if version.leases and not version.has_content and not version.loading:
            version.loading = True
            self._to_load[version] = None
            self.register.touch(version.entry)

    # ---------------------------------------------------------------- contents come and go

    def unload(self, entry: Entry, vanished: bool = False) -> None:
        """Hide an entry from new requests; it goes with its last lease. vanished: its folder is no longer there."""
        self.register.hide(entry, vanished)
        self._retire(entry.current)

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """Keep the entry's current version on the device, and what replaces it, or no longer."""
        entry.pinned = pinned
        if entry.current.slot is not None:
            self.pool.set_pinned(entry.current.slot, pinned)
        self.register.touch(entry)

    def _promote(self, version: Version) -> None:
        """A loaded candidate becomes what new requests get; those that still wait for the old content get it too."""
        entry, old = version.entry, version.entry.current
        version.candidate = False
        entry.current = version
        if not old.has_content:
            self._transfer(old, version)
        self._retire(old)

    def _retire(self, version: Version) -> None:
        version.retired = True
        version.entry.retired.append(version)
        if version.slot is not None:
            self.pool.set_pinned(version.slot, False)
        self._settle(version)

    def _lost(self, version: Version) -> None:
        """A version was evicted: those that wait for it wait for its next load, or for what has replaced it."""
        entry = version.entry
        if version.retired and not version.has_content and not entry.unloaded:
            self._transfer(version, entry.current)
        self._want(version)
        self._settle(version)
        self.register.touch(entry)

    def _transfer(self, source: Version, target: Version) -> None:
        """Leases on `source`, none of which has started, go on with `target`."""
        for lease in list(source.leases):
            assert not lease.started
            for part in lease.parts:
                if part.version is source:
                    part.version = target
            source.leases.pop(lease, None)
            target.leases[lease] = None
            error = _unfit(lease, target) if target.has_content else None
            if error is not None:
                self.fail(lease, error)
        target.leases = dict.fromkeys(sorted(target.leases, key=lambda lease: lease.order))
        self.residency.look(target)
        self._want(target)
        self._settle(source)

    def _settle(self, version: Version) -> None:
        """Drop what a version without leases need not keep: all, unless it is current and may be asked for again."""
        if version.leases:
            return
        if version in self._to_load:
            del self._to_load[version]
            version.loading = False
        if version.retired:
            self.residency.drop(version)
        else:
            self.residency.idle(version)
        entry = version.entry
        self.register.touch(entry)
        if version in entry.retired:
            entry.retired.remove(version)
            if entry.unloaded and not entry.retired:
                self.register.remove(entry)

    def check(self) -> None:
        """Prove that entries, versions, leases and pool agree."""
        self.residency.check()
        live = {version for entry in self.register.entries.values() for version in entry.versions}
        for version in self.residency.by_slot.values():
            assert version in live or version.entry.unloaded
            assert version.leases or not version.retired, "a retired version without leases holds pages"
        for version in [*self._to_load, *self.residency.hosted]:
            assert version.leases, "a content that nobody waits for is on its way"
        for version in live:
            assert all(any(part.version is version for part in lease.parts) for lease in version.leases)
            assert version.has_content or version.loading or not version.leases, "a lease waits for nothing"
            assert all(lease.absent is not self.residency.resident(lease) for lease in version.leases)


def _oldest(version: Version) -> int:
    return next(iter(version.leases)).order


def _unfit(lease: Lease, version: Version) -> AdapterError | None:
    """The first error of the lease's parts that are served by `version`."""
    parts = lease.parts
    return next((error for part in parts if part.version is version and (error := unfit(part, parts))), None)
