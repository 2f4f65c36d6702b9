"""Bring one adapter here: look, compare with what is here already, fetch what is missing, prove it, keep it.

Runs in a process of its own (`python -m lorry.server.sources.fetch`), so that neither the engine's loop nor the
frontend's shares its interpreter, a library that hangs can be ended, and no file can outgrow its limit. One line of
JSON on stdin is the job, one on stdout the revision or the error; when stdin ends the process does too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import resource
import sys
import threading
from pathlib import Path

import msgspec
import tenacity

from lorry.server.errors import LorryError, NotFound, PathRefused, SourceUnavailable
from lorry.server.sources import filesystem, https, hub
from lorry.server.sources.address import Source, parse
from lorry.server.sources.job import Job, Result
from lorry.server.sources.remote import Changed, Remote, Stat, check_digest, too_large
from lorry.server.sources.store import CONFIG, FILES, WEIGHTS, Store

ATTEMPTS = 5
NICENESS = 10
REASON_CHARACTERS = 300
MAX_CONFIG_BYTES = 1 << 20


def fetch(job: Job, remote: Remote | None = None) -> str:
    """The revision of the adapter at `job.source`, which lies in the store from now on.

    Passing errors are met by another attempt that goes on where the last one ended. Raises NotFound, PathRefused,
    MalformedAdapter for what is too large, SourceUnavailable.
    """
    source = parse(job.source)
    again = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=job.first_wait, max=20 * job.first_wait),
        retry=tenacity.retry_if_exception_type((ConnectionError, TimeoutError, Changed)),
        reraise=True,
    )
    try:
        remote = remote or _open(source, job)
        return again(_fetch, source, remote, Store(Path(job.root)), job.max_weights_bytes)
    except LorryError:
        raise
    except FileNotFoundError as error:
        name = next((name for name in FILES if name in str(error)), "")
        message = f"{source} {f'has no {name}' if name else 'is not there'}, or none that this server may see"
        raise NotFound(message, resource_type="adapter source", resource_name=str(source)) from None
    except PermissionError:
        raise PathRefused(f"{source} refuses access to this server", field="path") from None
    except Changed as error:
        raise SourceUnavailable(f"{source} changes while it is fetched", resource_name=str(source)) from error
    except Exception as error:
        raise SourceUnavailable(f"{source} cannot be fetched now", resource_name=str(source)) from error


def reason(error: LorryError) -> str:
    """What lies behind the error, for the server's log: without what stands in an address for a credential."""
    if error.__cause__ is None:
        return ""
    text = re.sub(r"\?\S+", "?…", str(error.__cause__))
    return f"{type(error.__cause__).__name__}: {re.sub(r'//[^/@]*@', '//…@', text)[:REASON_CHARACTERS]}"


def _open(source: Source, job: Job) -> Remote:
    if source.scheme == "hf":
        return hub.Folder(source)
    if source.scheme == "https":
        return https.Folder(source, job.plain_http)
    return filesystem.open_folder(source)


def _fetch(source: Source, remote: Remote, store: Store, max_weights_bytes: int) -> str:
    stats = {name: remote.stat(name) for name in FILES}
    most = {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: max_weights_bytes}
    for name, stat in stats.items():
        if stat.size is not None and stat.size > most[name]:
            raise too_large(name, str(stat.size), most[name])
    told = all(stat.version for stat in stats.values())
    key = _key(source, stats)
    with store.locked(key):
        if told and (revision := store.find(key)):
            return revision
        if not told:
            store.discard(key)
        part = store.part(key)
        for name, stat in stats.items():
            remote.fill(name, stat, part / name, most[name])
            check_digest(name, stat, part / name)
        if told and {name: remote.stat(name) for name in FILES} != stats:
            store.discard(key)
            raise Changed
        return store.keep(key)


def _key(source: Source, stats: dict[str, Stat]) -> str:
    return hashlib.sha256(msgspec.json.encode((str(source), list(stats.items())))).hexdigest()


def _end_with(descriptor: int) -> None:
    """End this process when the one that wants the adapter has gone."""
    while os.read(descriptor, 1 << 10):
        pass
    os._exit(1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.disable()  # libraries log addresses with their signatures
    os.nice(NICENESS)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with, args=(0,), daemon=True).start()
    most = max(job.max_weights_bytes, MAX_CONFIG_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        result = Result(revision=fetch(job))
    except LorryError as error:
        result = Result(kind=error.kind, message=error.message, fields=error.fields, reason=reason(error))
    answers.write(msgspec.json.encode(result) + b"\n")
    answers.flush()
    os._exit(0)  # whatever threads the libraries keep


if __name__ == "__main__":
    main()
