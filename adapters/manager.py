"""The adapters that a server knows, while it serves: all that the engine loop calls, in its thread, never waiting.

    request ─▶ lease ─▶ ready? ─▶ pin ⇄ unpin ─▶ release            requests
    load · unload · pin_adapter · get · list                        commands
    poll                                                            once a step: loads end, pages are copied, events

An id's content is read when a request first needs it. From then on the id stands for that revision, on the device or in
host memory, until it is dropped from both, replaced by `load(replace=True)`, or its files are seen to have changed
(`watch.py`). A lease never mixes revisions: what it has begun with stays until its release. A load that fails fails the
requests that wait for it; the next request tries again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorry.adapters.catalog import Catalog, is_valid_id
from lorry.adapters.device.pool import PagePool
from lorry.adapters.errors import AdapterExists, MalformedAdapter, UnknownAdapter
from lorry.adapters.lease import AdapterReference, Lease, Part, Version
from lorry.adapters.library import Library, unfit
from lorry.adapters.news import News
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.files import Place
from lorry.adapters.records import DEVICE, DISK, HOST, AdapterChanged, AdapterInfo, AdapterReply, Counters, Tiers


@dataclass(eq=False, slots=True)
class _Task:
    """A command that is answered when its lease is resident."""

    call_id: int
    lease: Lease
    pin: bool


class AdapterManager:
    """Catalog, loader, host memory and pool as one. `close` ends its threads.

    host_memory: bytes for contents in host memory, those on the device that have a copy there among them (`host.py`).
    """

    def __init__(self, catalog: Catalog, pool: PagePool, base: BaseWeights, host_memory: int = 0) -> None:
        self.pool = pool
        self._library = Library(catalog, pool, base, host_memory)
        self._register = self._library.register
        self._news = News(self._library)
        self._tasks: list[_Task] = []
        self._replies: list[AdapterReply] = []

    def close(self) -> None:
        self._news.close()
        self._library.close()

    @property
    def busy(self) -> bool:
        """Whether `poll` has something to do or to wait for."""
        return bool(self._tasks or self._replies or self._library.busy or self._news.busy)

    # ---------------------------------------------------------------- requests

    def request(self, refs: Iterable[AdapterReference]) -> Lease:
        """A hold on adapters, by id; those that are not resident start loading.

        Raises UnknownAdapter, or RevisionMismatch and MixRefused where the content is known already.
        """
        parts = [Part(self._register.known(ref.id).current, ref.weight, ref.revision) for ref in refs]
        for part in parts:
            if part.version.has_content and (error := unfit(part, parts)):
                raise error
        return self._library.lease(parts)

    def ready(self, lease: Lease) -> bool:
        """Whether all adapters are resident and may be pinned. Raises the AdapterError that prevents it for good."""
        if lease.error is not None:
            raise lease.error
        return self._library.residency.ready(lease)

    def pin(self, lease: Lease) -> None:
        """Hold the pages of a ready lease; from now on its revisions are fixed."""
        self._library.residency.pin(lease)

    def unpin(self, lease: Lease) -> None:
        """Let the pages go when others need the room; `ready` brings the same content back."""
        self._library.residency.unpin(lease)

    def release(self, lease: Lease) -> None:
        """The request has ended, whatever became of it."""
        self._library.release(lease)

    # ---------------------------------------------------------------- commands

    def load(
        self,
        call_id: int,
        adapter_id: str,
        path: str,
        expected_revision: str | None = None,
        pin: bool = False,
        replace: bool = False,
        fetched: str = "",
    ) -> None:
        """Register the folder at `path`, below a root, under an id and bring it to the device; `poll` answers.

        fetched: the folder to take in its stead, which bears its revision's name.

        An id that is taken needs `replace`; a registered folder that nobody uses and that is not on the device may be
        loaded without, and is read again. While a replacement loads, requests go on with the present content; if it is
        refused, nothing changes.
        Raises MalformedAdapter for a bad id, PathRefused, AdapterExists.
        """
        library = self._library
        if not is_valid_id(adapter_id):
            raise MalformedAdapter(f"id is {adapter_id[:80]!r}, [A-Za-z0-9._-]{{1,64}} is expected", "id")
        if adapter_id == self.pool.layout.base:
            raise AdapterExists(f"{adapter_id} is the base model's name", adapter_id)
        place = Place.named_by_revision(fetched) if fetched else self._register.catalog.resolve(path)
        entry = self._register.entries.get(adapter_id)
        if entry is None or entry.unloaded:
            version = self._register.add(adapter_id, place, provisional=True).current
        elif replace:
            version = Version(entry, place, candidate=True)
        elif entry.current.place == place and entry.current.slot is None and not entry.current.leases:
            version = entry.current
            library.residency.drop(version)
        else:
            raise AdapterExists(f"the adapter {adapter_id} exists; replace loads another in its place", adapter_id)
        lease = library.lease([Part(version, 1.0, expected_revision)], internal=True)
        self._tasks.append(_Task(call_id, lease, pin))

    def unload(self, adapter_id: str) -> AdapterInfo:
        """Forget an id: new requests do not find it, those in flight finish. Returns how it was left.

        Its state is DRAINING, until the last of them is done. Raises UnknownAdapter.
        """
        entry = self._register.known(adapter_id)
        gone = UnknownAdapter(f"the adapter {adapter_id} was unloaded", adapter_id)
        for task in self._tasks:
            if task.lease.error is None and task.lease.parts[0].version.entry is entry:
                self._library.fail(task.lease, gone)
        self._news.unload(entry, gone)
        self._library.unload(entry)
        return self._register.info(entry)

    def pin_adapter(self, call_id: int, adapter_id: str, pinned: bool) -> None:
        """Keep an adapter on the device, bringing it there first, or no longer; `poll` answers.

        Raises UnknownAdapter.
        """
        entry = self._register.known(adapter_id)
        if pinned:
            lease = self._library.lease([Part(entry.current, 1.0, None)], internal=True)
            self._tasks.append(_Task(call_id, lease, pin=True))
        else:
            self._library.set_pinned(entry, False)
            self._replies.append(AdapterReply(call_id, self._register.info(entry)))

    def get(self, adapter_id: str) -> AdapterInfo:
        """One adapter, also a draining one. Raises UnknownAdapter."""
        entry = self._register.entries.get(adapter_id) or self._register.known(adapter_id)
        return self._register.info(entry)

    def list(self, after: str = "", limit: int | None = None) -> list[AdapterInfo]:
        """Adapters ordered by id, `limit` of those behind `after`."""
        return [self._register.info(entry) for entry in self._register.page(after, limit)]

    # ---------------------------------------------------------------- once a step

    def poll(self, running: int = 0) -> Sequence[AdapterReply | AdapterChanged]:
        """End loads, copy a bounded number of bytes, answer commands; what has happened since the last call.

        running: sequences in the batch, with adapters or without.
        """
        self._news.step()
        self._library.end_loads()
        self._library.residency.step(self._library.fail)
        self._tasks = [task for task in self._tasks if not self._answer(task)]
        self._library.start_loads(running)
        events: Sequence[AdapterReply | AdapterChanged] = [*self._replies, *self._register.changes()]
        self._replies = []
        return events

    def take_counters(self) -> Counters:
        """What was counted since the last call."""
        taken, self._library.counters = self._library.counters, Counters()
        residency = self._library.residency
        taken.evictions, residency.evictions = residency.evictions, 0
        taken.host_evictions, residency.host_evictions = residency.host_evictions, 0
        taken.copy_seconds, residency.copy_seconds = residency.copy_seconds, []
        return taken

    def loaded(self) -> int:
        """Adapters on the device."""
        return len(self._library.residency.by_slot)

    def tiers(self) -> Tiers:
        """Where adapters are, and how much memory they take."""
        residency, tier = self._library.residency, self._library.tier
        on_device = {v.entry.id for slot, v in residency.by_slot.items() if self.pool.is_resident(slot)}
        in_host = {version.entry.id for version in tier.versions()} - on_device
        on_disk = max(0, len(self._register.entries) - len(on_device) - len(in_host))
        return Tiers(
            {DEVICE: len(on_device), HOST: len(in_host), DISK: on_disk},
            {DEVICE: self.pool.bytes_used, HOST: tier.bytes},
            tuple(sorted(on_device)),
        )

    def check(self) -> None:
        """Prove that entries, versions, leases and pool agree."""
        self._library.check()

    def _answer(self, task: _Task) -> bool:
        """Answer a command that has come to its end."""
        lease, entry = task.lease, task.lease.parts[0].version.entry
        if lease.error is None and not self._library.residency.resident(lease):
            return False
        if lease.error is None:
            if task.pin:
                self._library.set_pinned(entry, True)
            self._library.release(lease)
        info = self._register.info(entry) if lease.error is None else None
        self._replies.append(AdapterReply(task.call_id, info, lease.error))
        return True
