"""From what was seen on disk to what is known: entries for new folders, no more for those that are gone, new revisions.

A content that is in use or on the device is replaced as by a command: what there is serves until the new one has been
read, streams in flight finish on the old one. One that lies in host memory only is dropped, and read when it is asked
for. All of it in bounded parts: whoever changes thousands of folders at once delays no step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lorry.adapters.catalog import FilesState
from lorry.adapters.errors import UnknownAdapter
from lorry.adapters.lease import Entry, Lease, Part, Version
from lorry.adapters.library import Library
from lorry.adapters.reading.files import Place
from lorry.adapters.watch import Held, Looks, Watch

INTERVAL = 1.0  # seconds between two looks
_AT_ONCE = 16  # changes that one poll makes known
_REFRESHES = 2  # replacements under way, so that they do not stand in the way of requests' loads


class News:
    """One step at a time, in the engine's thread. clock: seconds, monotonic."""

    def __init__(self, library: Library, clock: Callable[[], float] = time.monotonic) -> None:
        self._library = library
        self._register = library.register
        self._watch = Watch(Looks(library.register.catalog, library.register.entries.keys()))
        self._clock = clock
        self._next = clock() + INTERVAL
        self._gone: deque[str] = deque()
        self._new: deque[tuple[str, Place]] = deque()
        self._changed: deque[tuple[str, FilesState]] = deque()
        self._refreshes: list[Lease] = []

    def close(self) -> None:
        self._watch.close()

    @property
    def busy(self) -> bool:
        """Whether something that was seen is still to be made known."""
        return bool(self._gone or self._new or self._changed or self._refreshes)

    def step(self) -> None:
        """Take what a look has seen, apply a part of it, begin the next look when it is due."""
        if self._watch.looking:
            if (seen := self._watch.end()) is not None:
                self._gone += seen.gone
                self._new += seen.new.items()
                self._changed += seen.changed.items()
        elif not self.busy and self._clock() >= self._next:
            self._next = self._clock() + INTERVAL
            self._watch.begin(self._held())
        self._refreshes = [lease for lease in self._refreshes if not self._ended(lease)]
        for _ in range(_AT_ONCE):
            if not self._apply():
                break

    def unload(self, entry: Entry, error: UnknownAdapter) -> None:
        """The entry is about to be forgotten: what would replace its content is not wanted."""
        for lease in self._refreshes:
            if lease.error is None and lease.parts[0].version.entry is entry:
                self._library.fail(lease, error)

    def _held(self) -> list[Held]:
        """The current contents in memory."""
        residency = self._library.residency
        versions = dict.fromkeys([*residency.by_slot.values(), *residency.tier.versions()])
        return [
            Held(version.entry.id, version.place.folder, version.files)
            for version in versions
            if version is version.entry.current and not version.retired and version.files is not None
        ]

    def _apply(self) -> bool:
        """Make one change known; False: there is none, or it has to wait."""
        if self._gone:
            if (entry := self._register.vanish(self._gone.popleft())) is not None:
                self.unload(entry, UnknownAdapter(f"the folder of the adapter {entry.id} is gone", entry.id))
                self._library.unload(entry, vanished=True)
        elif self._new:
            self._register.discover(*self._new.popleft())
        elif self._changed and len(self._refreshes) < _REFRESHES:
            self._refresh(*self._changed.popleft())
        else:
            return False
        return True

    def _refresh(self, adapter_id: str, files: FilesState) -> None:
        entry = self._register.entries.get(adapter_id)
        if entry is None or entry.unloaded or not entry.current.has_content:
            return
        current = entry.current
        current.files = files
        if current.slot is None and not current.leases:
            self._library.residency.drop(current)
            self._register.touch(entry)
        else:
            part = Part(Version(entry, current.place, candidate=True, replaces=current), 1.0, None)
            self._refreshes.append(self._library.lease([part], internal=True))

    def _ended(self, lease: Lease) -> bool:
        """Let go of a replacement that is on the device or was refused."""
        if lease.error is None:
            if lease.absent:
                return False
            self._library.release(lease)
        return True
