"""Who uses what: an id has an entry, an entry has versions (one content each), a request has a lease on versions.

Entry ──current──▶ Version ◀──parts── Lease
  └────retired───▶ Version ◀──parts── Lease     replaced or unloaded, kept for the leases that began with it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.catalog import FilesState
from lorry.adapters.errors import AdapterError
from lorry.adapters.reading.files import Place
from lorry.adapters.segments import Combo


class AdapterReference(Protocol):
    """One adapter of a request: its id, its weight in the mix, the revision that it must have or None."""

    @property
    def id(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def revision(self) -> str | None: ...


@dataclass(eq=False, slots=True)
class Version:
    """One content of an adapter, wherever its bytes are: `slot` on the device, `host` in memory, else on disk.

    slots: while it has a slot, all of them, as `PagePool.all_slots` says.
    A content that was evicted and read again may have another revision, as long as no lease has started on it.
    candidate: loads to replace the current version, and no other than `replaces`, if that is set.
    loading: queued or being read. files: their state when it was read, or when they were tried last.
    """

    entry: Entry
    place: Place
    revision: str = ""
    rank: int = 0
    target_modules: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    additive: bool = True
    invocation_tokens: tuple[int, ...] = ()
    slot: int | None = None
    slots: tuple[int, ...] = ()
    host: CanonicalAdapter | None = None
    loading: bool = False
    candidate: bool = False
    replaces: Version | None = None
    retired: bool = False
    files: FilesState | None = None
    leases: dict[Lease, None] = field(default_factory=dict)  # in the order of their requests

    @property
    def has_content(self) -> bool:
        return self.slot is not None or self.host is not None

    @property
    def started(self) -> bool:
        """Whether a request has computed with this content and is not done."""
        return any(lease.started for lease in self.leases)

    def describe(self, adapter: CanonicalAdapter) -> None:
        self.revision, self.rank = adapter.revision, adapter.rank
        self.target_modules, self.methods = adapter.target_modules, adapter.methods
        self.additive, self.invocation_tokens = adapter.additive, adapter.invocation_tokens


@dataclass(eq=False, slots=True)
class Entry:
    """An id. provisional: being loaded for the first time by a command; unloaded: only leases hold it."""

    id: str
    current: Version = field(init=False)
    retired: list[Version] = field(default_factory=list)
    pinned: bool = False
    error: str = ""
    provisional: bool = False
    unloaded: bool = False

    @classmethod
    def at(cls, adapter_id: str, place: Place, provisional: bool = False) -> Entry:
        entry = cls(adapter_id, provisional=provisional)
        entry.current = Version(entry, place)
        return entry

    @property
    def versions(self) -> list[Version]:
        return [*self.retired] if self.current.retired else [self.current, *self.retired]


@dataclass(eq=False, slots=True)
class Part:
    """One adapter of a lease; `wanted`: the revision that the request insists on."""

    version: Version
    weight: float
    wanted: str | None


@dataclass(eq=False, slots=True)
class Lease:
    """A request's hold on its adapters. order: of arrival; internal: a command's, not a request's.

    pinned: its pages may not go now; started: they were pinned once, so the revisions are fixed from then on.
    absent: some of its adapters are not on the device and on their way, so that there is no need to ask for more.
    """

    order: int
    parts: Sequence[Part]
    internal: bool = False
    pinned: bool = False
    started: bool = False
    absent: bool = True
    error: AdapterError | None = None

    @property
    def combo(self) -> Combo:
        """(slot, weight) for each slot of each adapter; valid while the lease is pinned, later they may differ."""
        combo = []
        for part in self.parts:
            assert self.pinned and part.version.slot is not None
            combo += [(slot, part.weight) for slot in part.version.slots]
        return tuple(combo)

    @property
    def revisions(self) -> tuple[str, ...]:
        """Of each adapter, in the request's order; fixed from the first pin on, before that "" when still unread."""
        return tuple(part.version.revision for part in self.parts)

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """Of a lease on one activated LoRA, which no mix has; of any other (). Known as soon as the revisions are."""
        return self.parts[0].version.invocation_tokens if self.parts else ()

    def versions(self) -> list[Version]:
        """Each version once."""
        return list(dict.fromkeys(part.version for part in self.parts))
