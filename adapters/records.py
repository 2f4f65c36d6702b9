"""What the manager tells the engine: descriptions, answers, events and counters."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from lorry.adapters.errors import AdapterError


class AdapterState(enum.IntEnum):
    """Where an adapter's bytes are.

    REGISTERED: on disk only. LOADING: on its way from disk or to the device. HOST: in host memory, checked.
    DEVICE: resident. DRAINING: unloaded, requests in flight still use it. FAILED: its last load was refused.
    """

    REGISTERED = 1
    LOADING = 2
    HOST = 3
    DEVICE = 4
    DRAINING = 5
    FAILED = 6


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter as an operator sees it.

    revision, rank and target_modules are empty until it has been read. bytes: on the device, with those of a replaced
    revision that streams still use. in_flight: requests that use it, the waiting ones included.
    """

    id: str
    revision: str
    rank: int
    target_modules: tuple[str, ...]
    state: AdapterState
    pinned: bool
    bytes: int
    in_flight: int
    methods: tuple[str, ...]
    error: str


@dataclass(frozen=True, slots=True)
class AdapterReply:
    """The answer to the `load` or `pin_adapter` that bore `call_id`: the adapter, or why not."""

    call_id: int
    adapter: AdapterInfo | None
    error: AdapterError | None = None


@dataclass(frozen=True, slots=True)
class AdapterChanged:
    """An adapter is new, has changed in more than `in_flight`, or is no longer known (`removed`)."""

    adapter: AdapterInfo
    removed: bool = False


DEVICE, HOST, DISK = "device", "host", "disk"
"""The tiers: each adapter is counted in the first of them that has it."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where all is now.

    adapters: by tier; bytes: of contents on the device and in host memory, copies there of what is on the device
    included; on_device: ids, in order
    """

    adapters: dict[str, int]
    bytes: dict[str, int]
    on_device: tuple[str, ...]


@dataclass(slots=True)
class Counters:
    """Since they were last taken.

    loads: ended loads by "success" and "failure"; load_seconds: from disk to host memory; copy_seconds: from there to
    the device, once there is room; evictions: from the device; host_evictions: from host memory, to the disk only;
    found: adapters of requests by the tier that had them when the request came
    """

    loads: dict[str, int] = field(default_factory=dict)
    load_seconds: list[float] = field(default_factory=list)
    copy_seconds: list[float] = field(default_factory=list)
    evictions: int = 0
    host_evictions: int = 0
    found: dict[str, int] = field(default_factory=dict)
