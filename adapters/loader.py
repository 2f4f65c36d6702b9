"""From disk to host memory in the background: read, hash, check, cut into pages.

Two threads; the engine thread hands in places and collects results between two steps, and never waits. The patient one
has a low priority, so that the forward pass keeps its cores; the urgent one has not. Both work in slices, at a pace
that the engine thread sets (`pace.py`), and each by itself: torch would wake a team of threads for a large tensor.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorry.adapters.canonical import CanonicalAdapter, canonicalise
from lorry.adapters.catalog import FilesState, files_state
from lorry.adapters.errors import AdapterError, MalformedAdapter
from lorry.adapters.layout import ModelLayout
from lorry.adapters.pace import Pace, Rest, no_rest
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.checkpoint import read_linears
from lorry.adapters.reading.files import Place, read_adapter
from lorry.adapters.reading.identity import check_base
from lorry.adapters.reading.revisions import Revisions
from lorry.adapters.reading.spec import AdapterSpec

log = logging.getLogger(__name__)

_NICENESS = {"adapter-loader": 10, "adapter-loader-urgent": 0}


def load_adapter(
    place: Place,
    layout: ModelLayout,
    dtype: torch.dtype,
    base: BaseWeights,
    warn: Callable[[str], object] = lambda _: None,
    revisions: Revisions | None = None,
    rest: Rest = no_rest,
) -> CanonicalAdapter:
    """Read and check one adapter folder; raises the AdapterError that says what is wrong with it.

    warn: told what is doubtful. revisions: those known already. rest: called every millisecond of work, about.
    """
    files = read_adapter(place, layout.max_weight_bytes(), revisions, rest)
    spec = AdapterSpec.from_bytes(bytes(files.config))
    if doubt := check_base(files.metadata, spec.base, layout):
        warn(doubt)
    linears = read_linears(files.tensors(), spec, layout, rest)
    return canonicalise(linears, spec, layout, base, dtype, files.revision, rest)


@dataclass(frozen=True, eq=False)
class Loaded:
    """The end of one load: `adapter` or `error`; `seconds` on disk and in checks. `token` is the submitter's.

    files: their state before they were read; what it says of the content holds unless they have another state now.
    """

    token: int
    adapter: CanonicalAdapter | None
    error: AdapterError | None
    seconds: float
    files: FilesState | None = None


class _Lane:
    """A queue of places to load, and a thread that takes them one by one."""

    def __init__(self, name: str, load: Callable[[int, Place], None]) -> None:
        self._name = name
        self._load = load
        self._jobs: queue.SimpleQueue[tuple[int, Place] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, token: int, place: Place) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put((token, place))

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        if hasattr(os, "setpriority") and _NICENESS[self._name]:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS[self._name])
        torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            self._load(*job)


class Loader:
    """Places to load, and a queue of what came of them."""

    def __init__(self, layout: ModelLayout, dtype: torch.dtype, base: BaseWeights) -> None:
        self._layout = layout
        self._base = base
        self._dtype = dtype
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._patient, self._urgent = (_Lane(name, self._run) for name in _NICENESS)
        self._warned: set[tuple[Path, str]] = set()
        self._revisions = Revisions()
        self._pace = Pace()
        torch.get_num_threads()  # what this thread has is its own from now on, whatever the loader's threads set

    def submit(self, token: int, place: Place, urgent: bool = False) -> None:
        """Load `place`; a `Loaded` with `token` follows."""
        (self._urgent if urgent else self._patient).submit(token, place)

    def pace(self, share: float) -> None:
        """How much of a core each thread may take from now on, for what it is at too; 1: all."""
        self._pace.share = share

    def results(self) -> list[Loaded]:
        """What has ended since the last call; returns at once."""
        done = []
        while True:
            try:
                done.append(self._done.get_nowait())
            except queue.Empty:
                return done

    def close(self) -> None:
        """End the threads after the loads that they are at, which pause no more."""
        self._pace.share = 1.0
        self._patient.close()
        self._urgent.close()

    def _run(self, token: int, place: Place) -> None:
        begun = time.monotonic()
        self._pace.begin()
        files = files_state(place.folder)
        adapter, error = self._load(place)
        self._done.put(Loaded(token, adapter, error, time.monotonic() - begun, files))

    def _load(self, place: Place) -> tuple[CanonicalAdapter | None, AdapterError | None]:
        try:
            warn = partial(self._warn, place)
            args = (self._layout, self._dtype, self._base, warn, self._revisions, self._pace.rest)
            return load_adapter(place, *args), None
        except AdapterError as error:
            return None, error
        except OSError as error:
            return None, MalformedAdapter(f"the adapter's files cannot be read: {error.strerror}")
        except Exception:
            log.exception("loading the adapter in %s failed", place.folder)
            return None, AdapterError("the adapter could not be loaded")

    def _warn(self, place: Place, doubt: str) -> None:
        """Once for each adapter."""
        if (place.folder, doubt) not in self._warned:
            self._warned.add((place.folder, doubt))
            log.warning("the adapter in %s: %s", place.folder.name, doubt)
