"""Which adapters there are: entries by id, what an operator sees of them, and what has changed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import islice

from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.errors import UnknownAdapter
from lorry.adapters.lease import Entry
from lorry.adapters.reading.files import Place
from lorry.adapters.records import AdapterChanged, AdapterInfo, AdapterState

_EVENTS = 64  # told at a time, which bounds what a step spends on them


class Register:
    """Entries of the catalog's folders, added as they are noticed, and those that commands have added."""

    def __init__(self, catalog: Catalog, pool: PagePool) -> None:
        self.entries: dict[str, Entry] = {}
        self.catalog = catalog
        self._pool = pool
        self._forgotten: set[str] = set()  # unloaded ids whose folder is still there
        self._changed: dict[Entry, None] = {}
        self._removed: list[AdapterInfo] = []
        self._told: dict[str, AdapterInfo] = {}
        self._order: list[str] | None = None  # ids, sorted
        self._listed = self.catalog.scan()
        for adapter_id, place in self._listed.items():  # nobody watches yet: these are no changes
            self.entries[adapter_id] = Entry.at(adapter_id, place)

    def add(self, adapter_id: str, place: Place, provisional: bool = False) -> Entry:
        """A new entry, in the place of an unloaded one that only its leases know."""
        self._forgotten.discard(adapter_id)
        entry = self.entries[adapter_id] = Entry.at(adapter_id, place, provisional)
        self._order = None
        self.touch(entry)
        return entry

    def discover(self, adapter_id: str, place: Place) -> None:
        """The catalog has a sub-folder of this name."""
        self._listed[adapter_id] = place
        entry = self.entries.get(adapter_id)
        if (entry is None or entry.unloaded) and adapter_id not in self._forgotten:
            self.add(adapter_id, place)

    def vanish(self, adapter_id: str) -> Entry | None:
        """The catalog has no sub-folder of this name any more; the entry that goes with it, unless it is pinned."""
        place = self._listed.pop(adapter_id, None)
        self._forgotten.discard(adapter_id)
        entry = self.entries.get(adapter_id)
        if entry is None or entry.unloaded or entry.pinned or entry.current.place != place:
            return None
        return entry

    def page(self, after: str = "", limit: int | None = None) -> list[Entry]:
        """Entries in order of their ids, from the first behind `after` on."""
        if self._order is None:
            self._order = sorted(self.entries)
        start = bisect_right(self._order, after)
        return [self.entries[adapter_id] for adapter_id in self._order[start:][:limit]]

    def known(self, adapter_id: str) -> Entry:
        """The entry that new requests get; raises UnknownAdapter."""
        entry = self.entries.get(adapter_id)
        if (entry is None or entry.unloaded) and adapter_id not in self._forgotten:
            place = self.catalog.find(adapter_id)
            if place is not None:
                self.discover(adapter_id, place)
                entry = self.entries[adapter_id]
        if entry is None or entry.unloaded:
            raise UnknownAdapter(f"no adapter has the id {adapter_id[:64]!r}", adapter_id[:64])
        return entry

    def hide(self, entry: Entry, vanished: bool = False) -> None:
        """New requests no longer find the entry, nor its folder, unless that has vanished: then another may come."""
        entry.unloaded = True
        if not vanished and self.catalog.find(entry.id) is not None:
            self._forgotten.add(entry.id)
        self.touch(entry)

    def remove(self, entry: Entry) -> None:
        """The entry is gone, unless another has its id by now."""
        if self.entries.get(entry.id) is entry:
            self._removed.append(self.info(entry))
            del self.entries[entry.id]
            self._order = None

    # ---------------------------------------------------------------- what an operator sees

    def info(self, entry: Entry) -> AdapterInfo:
        current, versions = entry.current, entry.versions
        slots = [version.slot for version in versions if version.slot is not None]
        return AdapterInfo(
            id=entry.id,
            revision=current.revision,
            rank=current.rank,
            target_modules=current.target_modules,
            state=self._state(entry),
            pinned=entry.pinned,
            bytes=sum(self._pool.bytes_of(self._pool.demand_of(slot)) for slot in slots),
            in_flight=sum(not lease.internal for version in versions for lease in version.leases),
            methods=current.methods,
            error=entry.error,
        )

    def _state(self, entry: Entry) -> AdapterState:
        current = entry.current
        if entry.unloaded:
            return AdapterState.DRAINING if entry.retired else AdapterState.REGISTERED
        if current.slot is not None:
            return AdapterState.DEVICE if self._pool.is_resident(current.slot) else AdapterState.LOADING
        if current.host is not None:
            return AdapterState.HOST
        if current.loading:
            return AdapterState.LOADING
        return AdapterState.FAILED if entry.error else AdapterState.REGISTERED

    # ---------------------------------------------------------------- events

    @property
    def busy(self) -> bool:
        """Whether there are changes to tell."""
        return bool(self._changed or self._removed)

    def touch(self, entry: Entry) -> None:
        """`entry` may have changed."""
        self._changed[entry] = None

    def changes(self) -> list[AdapterChanged]:
        """What has changed, `in_flight` apart; removals come first. At most `_EVENTS`, the rest the next time."""
        removed, self._removed = self._removed[:_EVENTS], self._removed[_EVENTS:]
        events = [AdapterChanged(info, removed=True) for info in removed]
        for info in removed:
            self._told.pop(info.id, None)
        for entry in list(islice(self._changed, 0 if self._removed else _EVENTS)):
            del self._changed[entry]
            if self.entries.get(entry.id) is entry:
                info = self.info(entry)
                told = replace(info, in_flight=0)
                if self._told.get(entry.id) != told:
                    self._told[entry.id] = told
                    events.append(AdapterChanged(info))
        return events
