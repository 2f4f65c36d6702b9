"""Which adapters there are: entries by id, what an operator sees of them, and what has changed."""

from __future__ import annotations

from dataclasses import replace

from lorry.adapters.catalog import Catalog
from lorry.adapters.errors import UnknownAdapter
from lorry.adapters.files import Place
from lorry.adapters.lease import Entry
from lorry.adapters.pool import PagePool
from lorry.adapters.records import AdapterChanged, AdapterInfo, AdapterState


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
        self.discover()

    def discover(self) -> None:
        """Register the catalog's folders that are new."""
        for adapter_id, place in self.catalog.scan().items():
            if adapter_id not in self.entries and adapter_id not in self._forgotten:
                self.add(adapter_id, place)

    def add(self, adapter_id: str, place: Place, provisional: bool = False) -> Entry:
        """A new entry, in the place of an unloaded one that only its leases know."""
        self._forgotten.discard(adapter_id)
        entry = self.entries[adapter_id] = Entry.at(adapter_id, place, provisional)
        self.touch(entry)
        return entry

    def known(self, adapter_id: str) -> Entry:
        """The entry that new requests get; raises UnknownAdapter."""
        entry = self.entries.get(adapter_id)
        if entry is None and adapter_id not in self._forgotten:
            place = self.catalog.find(adapter_id)
            entry = self.add(adapter_id, place) if place is not None else None
        if entry is None or entry.unloaded:
            raise UnknownAdapter(f"no adapter has the id {adapter_id[:64]!r}", adapter_id[:64])
        return entry

    def hide(self, entry: Entry) -> None:
        """New requests no longer find the entry, nor its folder."""
        entry.unloaded = True
        if self.catalog.find(entry.id) is not None:
            self._forgotten.add(entry.id)
        self.touch(entry)

    def remove(self, entry: Entry) -> None:
        """The entry is gone, unless another has its id by now."""
        if self.entries.get(entry.id) is entry:
            self._removed.append(self.info(entry))
            del self.entries[entry.id]

    # ---------------------------------------------------------------- what an operator sees

    def info(self, entry: Entry) -> AdapterInfo:
        current, versions = entry.current, entry.versions
        slots = [version.slot for version in versions if version.slot is not None]
        leases = {lease for version in versions for lease in version.leases if not lease.internal}
        return AdapterInfo(
            id=entry.id,
            revision=current.revision,
            rank=current.rank,
            target_modules=current.target_modules,
            state=self._state(entry),
            pinned=entry.pinned,
            bytes=sum(self._pool.bytes_of(self._pool.demand_of(slot)) for slot in slots),
            in_flight=len(leases),
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
        """What has changed since the last call, `in_flight` apart; removals come first."""
        events = [AdapterChanged(info, removed=True) for info in self._removed]
        for info in self._removed:
            self._told.pop(info.id, None)
        for entry in self._changed:
            if self.entries.get(entry.id) is entry:
                info = self.info(entry)
                told = replace(info, in_flight=0)
                if self._told.get(entry.id) != told:
                    self._told[entry.id] = told
                    events.append(AdapterChanged(info))
        self._changed, self._removed = {}, []
        return events
