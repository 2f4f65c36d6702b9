"""The engine's desk for adapters: the manager's answers and errors in the engine's own words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

from lorry.adapters import errors as theirs
from lorry.adapters import lease as their_lease
from lorry.adapters import records
from lorry.adapters.manager import AdapterManager
from lorry.server.engine.messages import (
    AdapterEvent,
    AdapterInfo,
    AdapterRef,
    AdapterReply,
    AdapterState,
    AdapterStats,
    EngineMessage,
    ErrorInfo,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)
from lorry.server.engine.report import Report
from lorry.server.engine.sequence import Combo, Lease
from lorry.server.errors import (
    AlreadyExists,
    InvalidField,
    LorryError,
    MalformedAdapter,
    NotFound,
    OutOfMemory,
    PathRefused,
    RevisionMismatch,
    WrongBase,
)

AdapterCommand = LoadAdapter | UnloadAdapter | PinAdapter | GetAdapters

_KINDS: dict[type[theirs.AdapterError], type[LorryError]] = {
    theirs.MalformedAdapter: MalformedAdapter,
    theirs.UnsupportedField: MalformedAdapter,
    theirs.PathRefused: PathRefused,
    theirs.UnknownAdapter: NotFound,
    theirs.WrongBase: WrongBase,
    theirs.RevisionMismatch: RevisionMismatch,
    theirs.AdapterExists: AlreadyExists,
    theirs.MixRefused: InvalidField,
    theirs.PoolTooSmall: OutOfMemory,
}
_RESULTS = {"success": "ok", "failure": "error"}


class AdapterDesk:
    """Residency for the scheduler, commands and events for the loop; every call returns at once."""

    def __init__(self, manager: AdapterManager) -> None:
        self.manager = manager
        self._room = manager.pool.room()

    @property
    def busy(self) -> bool:
        """Whether something is on its way that `poll` will tell of."""
        return self.manager.busy

    def request(self, refs: Sequence[AdapterRef]) -> Lease | None:
        """A lease on a request's adapters, None for the base; raises NotFound, RevisionMismatch, InvalidField."""
        if not refs:
            return None
        try:
            return self.manager.request(refs)
        except theirs.AdapterError as error:
            raise translated(error) from error

    def ready(self, lease: Lease) -> bool:
        try:
            return self.manager.ready(_theirs(lease))
        except theirs.AdapterError as error:
            raise translated(error) from error

    def pin(self, lease: Lease) -> None:
        self.manager.pin(_theirs(lease))

    def unpin(self, lease: Lease) -> None:
        self.manager.unpin(_theirs(lease))

    def release(self, lease: Lease) -> None:
        self.manager.release(_theirs(lease))

    def page_bound(self, combo: Combo) -> int:
        """The most pages that a combo of pinned adapters has in one linear of the layers."""
        return self.manager.pool.page_bound(slot for slot, _ in combo)

    def end_bound(self, combo: Combo) -> int:
        """The same of the embedding and the head; 0: it changes neither."""
        return self.manager.pool.end_bound(slot for slot, _ in combo)

    def obey(self, command: AdapterCommand, outbox: list[EngineMessage]) -> None:
        """Carry out a command; its reply comes at once or from a later `poll`."""
        try:
            match command:
                case LoadAdapter(call_id, id, path):
                    self.manager.load(
                        call_id,
                        id,
                        path,
                        command.expected_revision,
                        pin=command.pin,
                        replace=command.replace,
                        fetched=command.fetched,
                    )
                    return
                case PinAdapter(call_id, id, pinned):
                    self.manager.pin_adapter(call_id, id, pinned)
                    return
                case UnloadAdapter(call_id, id):
                    infos = [self.manager.unload(id)]
                case GetAdapters(call_id, id):
                    infos = [self.manager.get(id)] if id else self.manager.list(command.after, command.limit)
        except theirs.AdapterError as error:
            outbox.append(AdapterReply(command.call_id, error=_error_info(error)))
        else:
            outbox.append(AdapterReply(command.call_id, [_info(info) for info in infos]))

    def poll(self, report: Report, outbox: list[EngineMessage]) -> None:
        """Once a step: let loads go on, tell what has changed, count."""
        for event in self.manager.poll(len(report.scheduler.running)):
            match event:
                case records.AdapterReply(call_id, adapter, error):
                    infos = [] if adapter is None else [_info(adapter)]
                    outbox.append(AdapterReply(call_id, infos, None if error is None else _error_info(error)))
                case records.AdapterChanged(adapter, removed):
                    outbox.append(AdapterEvent(_info(adapter), removed))
        counters = self.manager.take_counters()
        report.adapter_loads += Counter({_RESULTS.get(name, name): n for name, n in counters.loads.items()})
        report.adapter_load_seconds += counters.load_seconds
        report.adapter_evictions += counters.evictions
        report.adapter_copy_seconds += counters.copy_seconds
        report.adapter_host_evictions += counters.host_evictions
        report.adapters_found += Counter(counters.found)

    def measure(self, report: Report) -> None:
        """The gauges, when they are about to be sent."""
        report.adapter_pages = self.manager.pool.pages_used, self.manager.pool.pages_total
        report.adapters_loaded = self.manager.loaded()
        tiers = self.manager.tiers()
        report.adapters = AdapterStats(tiers.adapters, tiers.bytes, tiers.on_device, self._room)

    def check(self) -> None:
        self.manager.check()


def translated(error: theirs.AdapterError) -> LorryError:
    """The domain error that a client sees."""
    kind = _KINDS.get(type(error), LorryError)
    if kind in (NotFound, AlreadyExists):
        return kind(error.message, resource_type="adapter", resource_name=error.field, **error.details)
    return kind(error.message, field=error.field, **error.details)


def _error_info(error: theirs.AdapterError) -> ErrorInfo:
    ours = translated(error)
    return ErrorInfo(ours.kind, ours.message, ours.fields)


def _theirs(lease: Lease) -> their_lease.Lease:
    return cast(their_lease.Lease, lease)


def _info(info: records.AdapterInfo) -> AdapterInfo:
    return AdapterInfo(
        id=info.id,
        revision=info.revision,
        rank=info.rank,
        target_modules=info.target_modules,
        state=AdapterState(info.state),
        pinned=info.pinned,
        bytes=info.bytes,
        in_flight=info.in_flight,
        methods=info.methods,
        error=info.error,
    )
