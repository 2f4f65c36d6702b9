"""The revision that an adapter's files have, and which of them need not be computed again.

    revision = SHA-256 over, for each file in order of name: len(name) · name · len(content) · content

with lengths as 8 bytes little-endian.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from lorry.adapters.pace import Rest, no_rest

FileState = tuple[int, int, int, int, int]
"""Device, inode, size, times of the last change to content and inode."""

States = tuple[tuple[str, FileState], ...]
"""Of all files of an adapter, by name."""

_PIECE = 256 << 10  # bytes hashed at a time, in 1 ms


def revision_of(files: Sequence[tuple[str, bytes | bytearray]], rest: Rest = no_rest) -> str:
    """64 lower-case hexadecimal digits; files as (name, content)."""
    digest = hashlib.sha256()
    for name, content in sorted(files, key=lambda file: file[0]):
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "little"))
            for begin in range(0, len(part), _PIECE):
                digest.update(memoryview(part)[begin : begin + _PIECE])
                rest()
    return digest.hexdigest()


class Revisions:
    """Revisions that were computed of files as they still are; for all threads.

    A file counts as the same while its state is: the time of the last change to the inode goes on with every write and
    can be set by nobody. Kept is what had been at rest for SETTLED seconds when its reading began: a clock may tick
    once in two seconds, and Linux takes up to 35 until it sees the next write through a mapping.

    most: revisions kept, those asked for last. now: seconds since the epoch, as files have it.
    """

    SETTLED = 40.0

    def __init__(self, most: int = 16384, now: Callable[[], float] = time.time) -> None:
        self._most = most
        self.now = now
        self._lock = threading.Lock()
        self._known: OrderedDict[States, str] = OrderedDict()

    def find(self, states: States) -> str | None:
        with self._lock:
            if (revision := self._known.get(states)) is not None:
                self._known.move_to_end(states)
            return revision

    def keep(self, states: States, revision: str, begun: float) -> None:
        """Of files that had these states before they were read and behind that; `begun` by `now`, before the first."""
        last = max(changed for _, (*_, content, inode) in states for changed in (content, inode))
        if last / 1e9 + self.SETTLED > begun:
            return
        with self._lock:
            self._known[states] = revision
            while len(self._known) > self._most:
                self._known.popitem(last=False)
