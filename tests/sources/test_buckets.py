"""S3 and GCS are read by fsspec; its filesystem in memory stands for theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from web_site import CONFIG, WEIGHTS

from lorry.adapters.reading import files
from lorry.server.errors import MalformedAdapter, NotFound
from lorry.server.sources import filesystem
from lorry.server.sources.address import parse
from lorry.server.sources.fetch import ATTEMPTS, fetch
from lorry.server.sources.filesystem import Folder
from lorry.server.sources.store import FILES

REVISION = files.revision_of(((FILES[0], CONFIG), (FILES[1], WEIGHTS)))
SOURCE = "s3://bucket/team/a"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A filesystem with an adapter in it, which S3's and GCS's addresses lead to."""
    filesystems = fsspec.filesystem("memory")
    for name, content in zip(FILES, (CONFIG, WEIGHTS), strict=True):
        filesystems.pipe_file(f"/bucket/team/a/{name}", content)
    monkeypatch.setattr(filesystem, "open_folder", lambda source: Folder(filesystems, source))
    yield filesystems
    filesystems.rm("/bucket", recursive=True)


@pytest.mark.parametrize("source", [SOURCE, "gs://bucket/team/a/"])
def test_two_files_come(memory: Any, job: Any, tmp_path: Path, source: str) -> None:
    assert fetch(job(source)) == REVISION
    folder = tmp_path / "store/adapters" / REVISION
    assert [(folder / name).read_bytes() for name in FILES] == [CONFIG, WEIGHTS]
    opened: list[str] = []
    memory.open, keep = lambda path, *args, **options: opened.append(path), memory.open
    try:
        assert fetch(job(source)) == REVISION
    finally:
        memory.open = keep
    assert opened == []


def test_a_download_goes_on_where_it_broke(memory: Any, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "CHUNK_BYTES", 50_021)
    chunks, begun = Folder._chunks, []

    def breaking(self: Folder, name: str, offset: int) -> Iterator[bytes]:
        begun.append((name, offset))
        for number, chunk in enumerate(chunks(self, name, offset)):
            if number == 2 and len(begun) < ATTEMPTS:
                raise TimeoutError
            yield chunk

    monkeypatch.setattr(Folder, "_chunks", breaking)
    assert fetch(job(SOURCE)) == REVISION
    assert begun == [(FILES[0], 0), *((FILES[1], 2 * number * 50_021) for number in range(4))]


def test_a_change_midway_begins_again(memory: Any, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, path = Folder._chunks, f"/bucket/team/a/{FILES[0]}"

    def changing(self: Folder, name: str, offset: int) -> Iterator[bytes]:
        yield from chunks(self, name, offset)
        if memory.cat_file(path) == CONFIG:
            memory.pipe_file(path, CONFIG + b" ")

    monkeypatch.setattr(Folder, "_chunks", changing)
    revision = fetch(job(SOURCE))
    assert (tmp_path / "store/adapters" / revision / FILES[0]).read_bytes() == CONFIG + b" "


def test_what_is_missing_or_too_large(memory: Any, job: Any) -> None:
    with pytest.raises(MalformedAdapter, match="at most 1000"):
        fetch(job(SOURCE, 1000))
    memory.rm_file(f"/bucket/team/a/{FILES[1]}")
    with pytest.raises(NotFound, match=f"{SOURCE} has no {FILES[1]}"):
        fetch(job(SOURCE))
    with pytest.raises(NotFound, match=f"has no {FILES[0]}"):
        fetch(job("s3://bucket/other"))


def test_a_folder_in_the_place_of_a_file(memory: Any) -> None:
    memory.pipe_file(f"/bucket/team/b/{FILES[0]}/x", b"")
    with pytest.raises(FileNotFoundError):
        Folder(memory, parse("s3://bucket/team/b")).stat(FILES[0])
