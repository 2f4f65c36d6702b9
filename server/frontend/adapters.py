"""Adapter commands and their answers, who watches, and what a new engine must be told of what was done before.

The frontend keeps a mirror of the engine's adapters: events change it, each new engine's list replaces it, and
watchers see the difference. Loads, unloads and pins that succeeded are repeated to an engine that was started again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass, field

import msgspec

from lorry.server.engine.messages import (
    AdapterEvent,
    AdapterInfo,
    AdapterReply,
    AdapterState,
    Command,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)
from lorry.server.errors import AlreadyExists, EngineUnavailable, LorryError, from_wire
from lorry.server.frontend.interface import AdapterChange, ChangeKind
from lorry.server.sources.address import is_address

logger = logging.getLogger(__name__)

Infos = list[AdapterInfo]
_PART = 128  # of a list that the engine is asked for at once: a millisecond or two between two steps
Lasting = LoadAdapter | UnloadAdapter | PinAdapter  # what a new engine is told again
AdapterCommand = Lasting | GetAdapters


@dataclass(slots=True, eq=False)
class _Watcher:
    """Changes that have not been read, the last one of each adapter."""

    ids: frozenset[str]
    changes: dict[str, AdapterChange] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, change: AdapterChange) -> None:
        if not self.ids or change.adapter.id in self.ids:
            self.changes.pop(change.adapter.id, None)
            self.changes[change.adapter.id] = change
            self.arrived.set()


class EngineAdapters:
    """See `interface.Adapters`."""

    def __init__(
        self,
        send: Callable[[Command], None],
        check_up: Callable[[], None],
        fetch: Callable[[str], Awaitable[str]] | None = None,
        keep: Callable[[Collection[str]], None] = lambda _: None,
    ) -> None:
        """`check_up` raises EngineUnavailable while there is no engine; `fetch`: address → local folder; `keep`: told
        which of these folders are in use whenever that changes."""
        self._send = send
        self._check_up = check_up
        self._fetch = fetch
        self._keep = keep
        self._fetching_again: set[asyncio.Task[None]] = set()
        self._calls = itertools.count(1)
        self._open: dict[int, asyncio.Future[Infos]] = {}
        self._mirror: dict[str, AdapterInfo] = {}
        self._watchers: set[_Watcher] = set()
        self._journal: dict[str, tuple[Lasting, ...]] = {}
        self._listing = -1  # call_id of the list that a new engine was asked for

    async def load(
        self, id: str, path: str, *, expected_revision: str | None = None, pin: bool = False, replace: bool = False
    ) -> AdapterInfo:
        fetched = await self._fetched(id, path, replace)
        command = LoadAdapter(next(self._calls), id, path, expected_revision, pin, replace, fetched)
        (info,) = await self._call(command)
        # its revision is not part of what is repeated: the folder may have been replaced since
        self._journal[id] = (LoadAdapter(0, id, path, pin=pin, replace=True, fetched=fetched),)
        self._keep_fetched()
        return info

    def close(self) -> None:
        """Fetch nothing again."""
        for task in self._fetching_again:
            task.cancel()

    async def unload(self, id: str) -> AdapterInfo:
        command = UnloadAdapter(next(self._calls), id)
        (info,) = await self._call(command)
        self._journal[id] = (command,)
        self._keep_fetched()
        return info

    async def pin(self, id: str, pinned: bool) -> AdapterInfo:
        command = PinAdapter(next(self._calls), id, pinned)
        (info,) = await self._call(command)
        before = (each for each in self._journal.get(id, ()) if not isinstance(each, PinAdapter))
        self._journal[id] = (*before, command)
        return info

    async def get(self, id: str) -> AdapterInfo:
        (info,) = await self._call(GetAdapters(next(self._calls), id))
        return info

    async def list(self, after: str = "", limit: int | None = None) -> Infos:
        found: Infos = []
        while limit is None or len(found) < limit:
            part = _PART if limit is None else min(_PART, limit - len(found))
            infos = await self._call(GetAdapters(next(self._calls), after=after, limit=part))
            found += infos
            if len(infos) < part:
                break
            after = infos[-1].id
        return found

    async def watch(self, ids: Collection[str] = ()) -> AsyncGenerator[AdapterChange, None]:
        watcher = _Watcher(frozenset(ids))
        for id in sorted(self._mirror):
            watcher.add(AdapterChange(ChangeKind.PRESENT, self._mirror[id]))
        self._watchers.add(watcher)
        try:
            while True:
                while watcher.changes:
                    yield watcher.changes.pop(next(iter(watcher.changes)))
                watcher.arrived.clear()
                await watcher.arrived.wait()
        finally:
            self._watchers.discard(watcher)

    # ---------------------------------------------------------------- what the engine says

    def replied(self, reply: AdapterReply) -> None:
        """The answer to a command; nobody may wait for it any more."""
        if reply.call_id == self._listing:  # at once: a change may follow in the same batch
            self._replace_mirror(reply.adapters)
            return
        future = self._open.pop(reply.call_id, None)
        if future is None or future.done():
            return
        if reply.error is not None:
            future.set_exception(from_wire(reply.error.kind, reply.error.message, reply.error.fields))
        else:
            future.set_result(reply.adapters)

    def changed(self, event: AdapterEvent) -> None:
        """An adapter changed."""
        if event.removed:
            self._mirror.pop(event.adapter.id, None)
        else:
            self._mirror[event.adapter.id] = event.adapter
        kind = ChangeKind.REMOVED if event.removed else ChangeKind.CHANGED
        self._tell(AdapterChange(kind, event.adapter))

    def engine_down(self, error: LorryError) -> None:
        """No answer comes any more."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
        self._open.clear()

    def engine_up(self) -> None:
        """Tell a new engine what was done before, and take its adapters over."""
        for commands in self._journal.values():
            for command in commands:
                self._repeat(command)
        self._listing = next(self._calls)
        self._send(GetAdapters(self._listing))

    # ---------------------------------------------------------------- inside

    async def _fetched(self, id: str, path: str, replace: bool) -> str:
        """The folder that an address was fetched to; "" for a path below the local roots, which the engine knows."""
        if not is_address(path) or self._fetch is None:
            return ""
        self._check_up()
        known = self._mirror.get(id)
        if known is not None and known.state is not AdapterState.DRAINING and not replace:
            message = f"the adapter {id} exists; replace loads another in its place"
            raise AlreadyExists(message, resource_type="adapter", resource_name=id)
        return await self._fetch(path)

    async def _fetch_again(self, command: LoadAdapter) -> None:
        """What a new engine could not read of an adapter that was fetched comes from its source once more."""
        try:
            fetched = await self._fetched(command.id, command.path, replace=True)
            before = self._journal.get(command.id, ())
            if command not in before:  # unloaded or replaced meanwhile
                return
            again = msgspec.structs.replace(command, call_id=next(self._calls), fetched=fetched)
            await self._call(again)
        except LorryError as error:
            logger.warning("adapter %s is not as it was before the restart: %s", command.id, error)
            return
        self._journal[command.id] = (msgspec.structs.replace(again, call_id=0), *before[1:])
        self._keep_fetched()
        for each in before[1:]:
            self._repeat(each)

    def _keep_fetched(self) -> None:
        lasting = (each for commands in self._journal.values() for each in commands)
        self._keep({each.fetched for each in lasting if isinstance(each, LoadAdapter) and each.fetched})

    async def _call(self, command: AdapterCommand) -> Infos:
        self._check_up()
        future = self._expect(command)
        self._send(command)
        try:
            return await future
        finally:
            self._open.pop(command.call_id, None)

    def _expect(self, command: AdapterCommand) -> asyncio.Future[Infos]:
        future: asyncio.Future[Infos] = asyncio.get_running_loop().create_future()
        self._open[command.call_id] = future
        return future

    def _repeat(self, command: Lasting) -> None:
        again = msgspec.structs.replace(command, call_id=next(self._calls))

        def done(future: asyncio.Future[Infos]) -> None:
            if future.cancelled() or (error := future.exception()) is None:
                return
            if isinstance(command, LoadAdapter) and command.fetched and not isinstance(error, EngineUnavailable):
                task = asyncio.get_running_loop().create_task(self._fetch_again(command))
                self._fetching_again.add(task)
                task.add_done_callback(self._fetching_again.discard)
            else:
                logger.warning("adapter %s is not as it was before the restart: %s", command.id, error)

        self._expect(again).add_done_callback(done)
        self._send(again)

    def _replace_mirror(self, infos: Infos) -> None:
        now = {info.id: info for info in infos}
        before, self._mirror = self._mirror, now
        for id, info in before.items():
            if id not in now:
                self._tell(AdapterChange(ChangeKind.REMOVED, info))
        for id, info in now.items():
            if before.get(id) != info:
                self._tell(AdapterChange(ChangeKind.CHANGED, info))

    def _tell(self, change: AdapterChange) -> None:
        for watcher in self._watchers:
            watcher.add(change)
