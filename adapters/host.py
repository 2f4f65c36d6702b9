"""Contents in host memory, checked and cut into pages: what comes back from here needs neither disk nor checks.

Those that somebody waits for stay. Of the others, the one that was asked for longest ago goes first when all together
are more than `capacity_bytes`. A content that is also on the device counts once: where the pool keeps its pages in host
memory too, they are the very ones that lie here, and stay as long as the device has them.
"""

from __future__ import annotations

from collections.abc import Callable

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.lease import Version


class HostTier:
    """The versions whose `host` is set; nobody else sets it. capacity_bytes: for contents that nobody waits for."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.bytes = 0
        self._sizes: dict[Version, int] = {}  # the one asked for longest ago first

    def versions(self) -> list[Version]:
        """Whose content is here."""
        return list(self._sizes)

    def put(self, version: Version, adapter: CanonicalAdapter) -> None:
        """Keep the content of a version."""
        assert version.host is None
        version.host = adapter
        self._sizes[version] = adapter.nbytes
        self.bytes += self._sizes[version]

    def size(self, version: Version) -> int:
        return self._sizes.get(version, 0)

    def touch(self, version: Version) -> None:
        """A version was asked for now."""
        if (size := self._sizes.pop(version, None)) is not None:
            self._sizes[version] = size

    def drop(self, version: Version) -> None:
        """Forget the content of a version, if it is here."""
        version.host = None
        self.bytes -= self._sizes.pop(version, 0)

    def shed(self, needed: Callable[[Version], bool]) -> list[Version]:
        """Drop what is too much, of the versions that are not needed; those that went."""
        gone: list[Version] = []
        if self.bytes <= self.capacity_bytes:
            return gone
        for version in list(self._sizes):
            if not needed(version):
                self.drop(version)
                gone.append(version)
                if self.bytes <= self.capacity_bytes:
                    break
        return gone

    def check(self) -> None:
        """Prove that the books agree."""
        assert self.bytes == sum(self._sizes.values())
        for version, size in self._sizes.items():
            assert version.host is not None and version.host.nbytes == size
