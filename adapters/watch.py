"""What changes on disk while adapters are served, looked for again and again in a thread beside the step loop.

A sub-folder is new or gone when two looks in a row say so. Files have changed when they are not those that were read,
and two looks in a row found them alike: what is being written is left alone, and read when it has come to rest. (If it
rests half-written, the load fails, what is served stays, and the next change is the next try.)

Nothing is read here. A look lists the folder, unless it has stayed as it was for two looks, and asks for the state of
files whose content is in memory, no others.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorry.adapters.catalog import Catalog, FilesState, files_state
from lorry.adapters.reading.files import Place

log = logging.getLogger(__name__)

_NICENESS = 10
_CLOSING = 1.0  # seconds that a look may take to end; on a dead network folder it never does
_REST = 0.001  # seconds, between two parts of a list: the step loop gets the interpreter back


@dataclass(frozen=True, slots=True)
class Held:
    """A content in memory, and the state of the files when it was read."""

    id: str
    folder: Path
    state: FilesState


@dataclass(frozen=True, slots=True)
class Seen:
    """What two looks agree on: new sub-folders, names that are gone, and the state of files that have changed."""

    new: dict[str, Place]
    gone: Sequence[str]
    changed: dict[str, FilesState]


class Looks:
    """The comparison of each look with the one before. known: names that the sub-folders had at the start."""

    def __init__(self, catalog: Catalog, known: Collection[str]) -> None:
        self._catalog = catalog
        self._known = set(known)
        self._before = set(known)
        self._unsettled: dict[str, FilesState] = {}
        self._changes: list[int | None] = [None, None]  # of the folder, as the last two looks found them

    def look(self, held: Sequence[Held]) -> Seen:
        """Compare the disk with what was told before, and with the contents in memory."""
        new: dict[str, Place] = {}
        gone: list[str] = []
        change = self._catalog.last_change()
        places = None
        if change is None or self._changes != [change, change]:
            places = self._catalog.listed(partial(time.sleep, _REST))
        self._changes = [self._changes[1], change]
        if places is not None:  # a folder that cannot be listed says nothing about what is in it
            names = places.keys()
            new = {name: places[name] for name in names & self._before - self._known}
            gone = sorted(self._known - self._before - names)
            self._known = (self._known | new.keys()) - set(gone)
            self._before = set(names)
        return Seen(new, gone, self._changed(held))

    def _changed(self, held: Sequence[Held]) -> dict[str, FilesState]:
        changed, unsettled = {}, {}
        for content in held:
            state = files_state(content.folder)
            if state is None or state == content.state:
                continue
            if self._unsettled.get(content.id) == state:
                changed[content.id] = state
            else:
                unsettled[content.id] = state
        self._unsettled = unsettled
        return changed


class Watch:
    """Looks, one at a time, in a thread of low priority. `begin` and `end` return at once."""

    def __init__(self, looks: Looks) -> None:
        self._looks = looks
        self._jobs: queue.SimpleQueue[Sequence[Held] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Seen | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.looking = False

    def begin(self, held: Sequence[Held]) -> None:
        """Look once; `end` returns what was seen."""
        assert not self.looking
        self.looking = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="adapter-watch", daemon=True)
            self._thread.start()
        self._jobs.put(held)

    def end(self) -> Seen | None:
        """What the look has seen; None: it goes on, or failed."""
        try:
            seen = self._done.get_nowait()
        except queue.Empty:
            return None
        self.looking = False
        return seen

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_CLOSING)
            self._thread = None

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (held := self._jobs.get()) is not None:
            try:
                self._done.put(self._looks.look(held))
            except Exception:
                log.exception("a look at the adapters' folder failed")
                self._done.put(None)
