"""Bring one adapter here: look, compare with what is here already, fetch what is missing, prove it, keep it.

Runs in a process of its own (`python -m lorry.server.sources.fetch`), so that neither the engine's loop nor the
frontend's shares its interpreter, a library that hangs can be ended, and no file can outgrow its limit. One line of
JSON on stdin is the job, one on stdout the revision or the error; when stdin ends the process does too.
"""

from __future__ import annotations

import contextlib
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

from lorry.adapters.errors import AdapterError
from lorry.adapters.reading.shards import INDEX_NAME, MAX_INDEX_BYTES, ShardIndex
from lorry.server.errors import LorryError, MalformedAdapter, NotFound, PathRefused, SourceUnavailable
from lorry.server.sources import filesystem, https, hub
from lorry.server.sources.address import Source, parse
from lorry.server.sources.job import Job, Result
from lorry.server.sources.prune import prune
from lorry.server.sources.remote import Changed, Remote, Stat, check_digest, too_large
from lorry.server.sources.store import CONFIG, WEIGHTS, Store

ATTEMPTS = 5
NICENESS = 10
REASON_CHARACTERS = 300
MAX_CONFIG_BYTES = 1 << 20

_NAMES = re.compile(r"adapter_config\.json|adapter_model[\w-]*\.safetensors(?:\.index\.json)?")


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
        name = next(reversed(_NAMES.findall(str(error))), "")
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
    stats, index = _look(source, remote, store)
    most = {CONFIG: MAX_CONFIG_BYTES, INDEX_NAME: MAX_INDEX_BYTES}
    left = max_weights_bytes
    for name, stat in stats.items():
        if stat.size is not None and stat.size > most.get(name, left):
            raise too_large(name, str(stat.size), most.get(name, left))
        left -= stat.size or 0 if name not in most else 0
    told = all(stat.version for stat in stats.values())
    key = _key(source, stats)
    with store.locked(key):
        if told and (revision := store.find(key)):
            return revision
        if not told:
            store.discard(key)
        part = store.part(key)
        left = max_weights_bytes
        for name, stat in stats.items():
            if name == INDEX_NAME:
                (part / name).write_bytes(index)
                continue
            remote.fill(name, stat, part / name, most.get(name, left))
            check_digest(name, stat, part / name)
            left -= 0 if name in most else os.path.getsize(part / name)
        if told and {name: remote.stat(name) for name in stats} != stats:
            store.discard(key)
            raise Changed
        return store.keep(key, stats)


def _look(source: Source, remote: Remote, store: Store) -> tuple[dict[str, Stat], bytes]:
    """How each of the adapter's files is now, and the content of the index where there is no single file of weights."""
    stats = {CONFIG: remote.stat(CONFIG)}
    try:
        return stats | {WEIGHTS: remote.stat(WEIGHTS)}, b""
    except FileNotFoundError as missing:
        try:
            stats[INDEX_NAME] = stat = remote.stat(INDEX_NAME)
        except FileNotFoundError:
            raise missing from None
    if stat.size is not None and stat.size > MAX_INDEX_BYTES:
        raise too_large(INDEX_NAME, str(stat.size), MAX_INDEX_BYTES)
    key = _key(source, stats)
    with store.locked(key):
        if not stat.version:
            store.discard(key)
        path = store.part(key) / INDEX_NAME
        remote.fill(INDEX_NAME, stat, path, MAX_INDEX_BYTES)
        check_digest(INDEX_NAME, stat, path)
        content = path.read_bytes()
        store.discard(key)
    try:
        names = ShardIndex.from_bytes(content).shards
    except AdapterError as error:
        raise MalformedAdapter(error.message, field=error.field) from None
    return stats | {name: remote.stat(name) for name in names}, content


def _key(source: Source, stats: dict[str, Stat]) -> str:
    return hashlib.sha256(msgspec.json.encode((str(source), list(stats.items())))).hexdigest()


def _prune(job: Job) -> None:
    with contextlib.suppress(OSError):  # what is too much today is tried again with the next download
        prune(Path(job.root), job.cache_bytes)


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
    most = max(job.max_weights_bytes, MAX_CONFIG_BYTES, MAX_INDEX_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        result = Result(revision=fetch(job))
        _prune(job)
    except LorryError as error:
        result = Result(kind=error.kind, message=error.message, fields=error.fields, reason=reason(error))
    answers.write(msgspec.json.encode(result) + b"\n")
    answers.flush()
    os._exit(0)  # whatever threads the libraries keep


if __name__ == "__main__":
    main()
