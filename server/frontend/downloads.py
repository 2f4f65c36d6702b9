"""Adapters that are fetched before the engine hears of them: one process for each, a few at a time, never waited for.

A client that leaves ends its download; what has come stays and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from lorry.server.errors import Draining, SourceUnavailable, from_wire
from lorry.server.sources.address import Allowed
from lorry.server.sources.job import Job, Result
from lorry.server.sources.store import default_root
from lorry.server.sources.uses import Uses

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "lorry.server.sources.fetch")
AT_A_TIME = 4
SECONDS = 1800.0  # for one download, its attempts together


class Downloads:
    """Fetches from the allowed prefixes into a store on disk."""

    def __init__(
        self,
        prefixes: Sequence[str],
        root: Path | None = None,
        *,
        cache_bytes: int | None = None,
        job: Job | None = None,
        command: Sequence[str] = COMMAND,
        seconds: float = SECONDS,
    ) -> None:
        """`cache_bytes`: that the store may have after a download; `job`: what all jobs have in common.

        Raises PathRefused for a wrong prefix.
        """
        self._allowed = Allowed(prefixes)
        self._root = root
        self._job = replace(job or Job(source="", root="", max_weights_bytes=0), cache_bytes=cache_bytes)
        self._uses = Uses(root or default_root())
        self._command = tuple(command)
        self._seconds = seconds
        self._slots = asyncio.Semaphore(AT_A_TIME)
        self._running: set[asyncio.subprocess.Process] = set()
        self._closed = False

    async def fetch(self, address: str, max_weights_bytes: int) -> str:
        """The folder on this machine that holds the adapter as it is at `address` now, named by its revision.

        Raises PathRefused, NotFound, MalformedAdapter for too large a file, SourceUnavailable.
        """
        source = str(self._allowed.check(address))
        root = self._root or default_root()
        job = replace(self._job, source=source, root=str(root), max_weights_bytes=max_weights_bytes)
        async with self._slots:
            result = await self._run(job)
        if result.kind:
            logger.warning("%s was not fetched: %s", source, result.reason or result.message)
            raise from_wire(result.kind, result.message, result.fields)
        self._use(self._uses.revisions | {result.revision})
        return str(root / "adapters" / result.revision)

    def keep(self, folders: Collection[str]) -> None:
        """Of all that was fetched these are in use from now on, and no others: nobody may remove them."""
        self._use({Path(folder).name for folder in folders})

    def _use(self, revisions: Collection[str]) -> None:
        try:
            self._uses.replace(revisions)
        except OSError as error:
            logger.warning("the adapters in use are not known to others that share the cache: %s", error.strerror)

    def close(self) -> None:
        """End what is under way; no fetch begins any more."""
        self._closed = True
        self._uses.close()
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _run(self, job: Job) -> Result:
        if self._closed:
            raise Draining("the server is going away")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._running.add(process)
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(msgspec.json.encode(job) + b"\n")  # stays open: its end would end the process
            async with asyncio.timeout(self._seconds):
                answer = await process.stdout.readline()
                if answer:
                    return msgspec.json.decode(answer, type=Result)
        except TimeoutError:
            message = f"{job.source} was not fetched within {self._seconds:g} seconds; the next attempt goes on"
            raise SourceUnavailable(message, resource_name=job.source) from None
        finally:
            self._running.discard(process)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
        if self._closed:
            raise Draining("the server is going away")
        logger.error("the process that fetched %s ended with %s", job.source, process.returncode)
        raise SourceUnavailable(f"{job.source} cannot be fetched now", resource_name=job.source)
