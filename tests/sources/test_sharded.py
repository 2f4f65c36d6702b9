"""Adapters whose weights lie in several files: which of them are fetched, and what an index may not ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from web_site import CONFIG, SHARDED, WEIGHTS

from lorry.adapters.reading import files
from lorry.adapters.reading.shards import INDEX_NAME, MAX_INDEX_BYTES, shard_name
from lorry.server.errors import MalformedAdapter, NotFound
from lorry.server.sources import filesystem
from lorry.server.sources.fetch import fetch
from lorry.server.sources.filesystem import Folder
from lorry.server.sources.store import FILES

CONTENTS = {FILES[0]: CONFIG} | SHARDED
REVISION = files.revision_of(tuple(CONTENTS.items()))
ONE, TWO = shard_name(1, 2), shard_name(2, 2)


@pytest.fixture
def sharded(site: Any) -> Any:
    """A site with the adapter in shards and files that nobody asks for."""
    others = {"README.md": b"#", "optimizer.pt": b"x" * 999, "adapter_model.bin": b"x"}
    site.files = {f"/mine/a/{name}": content for name, content in (CONTENTS | others).items()}
    return site


def stored(root: Path, revision: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "store/adapters" / revision).iterdir()}


def test_the_index_and_its_shards_come(sharded: Any, job: Any, tmp_path: Path) -> None:
    assert fetch(job(sharded.address)) == REVISION
    assert stored(tmp_path, REVISION) == CONTENTS
    assert sorted(name for name, _ in sharded.gets()) == sorted([*CONTENTS, FILES[1]]), "a GET after a HEAD is a 404"
    sharded.asked.clear()
    assert fetch(job(sharded.address)) == REVISION
    assert {name for name, _ in sharded.gets()} == {INDEX_NAME, FILES[1]}
    assert [path.name for path in (tmp_path / "store/parts").iterdir() if path.is_dir()] == []


def test_a_single_file_is_what_peft_reads(sharded: Any, job: Any, tmp_path: Path) -> None:
    sharded.files[f"/mine/a/{FILES[1]}"] = WEIGHTS
    revision = fetch(job(sharded.address))
    assert stored(tmp_path, revision) == {FILES[0]: CONFIG, FILES[1]: WEIGHTS}


def test_a_new_version_of_a_shard_is_another_revision(sharded: Any, job: Any, tmp_path: Path) -> None:
    fetch(job(sharded.address))
    path = f"/mine/a/{TWO}"
    sharded.files[path], sharded.etags[path] = SHARDED[TWO][::-1], '"two"'
    revision = fetch(job(sharded.address))
    assert stored(tmp_path, revision) == CONTENTS | {TWO: SHARDED[TWO][::-1]}
    assert stored(tmp_path, REVISION) == CONTENTS


def test_what_has_no_version_is_fetched_each_time(sharded: Any, job: Any, tmp_path: Path) -> None:
    sharded.etags = dict.fromkeys(sharded.files, "")
    assert fetch(job(sharded.address)) == fetch(job(sharded.address)) == REVISION
    assert sum(name == TWO for name, _ in sharded.gets()) == 2


def test_a_shard_that_breaks_goes_on(sharded: Any, job: Any, tmp_path: Path) -> None:
    cut: list[int] = []

    def spoil(handler: Any, path: str, offset: int) -> bool:
        if handler.command == "HEAD" or not path.endswith(TWO) or cut:
            return False
        cut.append(offset)
        handler.answer(200, SHARDED[TWO][:50_021], len(SHARDED[TWO]), ETag='"one"')
        handler.close_connection = True
        return True

    sharded.spoil = spoil
    assert fetch(job(sharded.address)) == REVISION
    assert stored(tmp_path, REVISION) == CONTENTS
    assert sum(name == ONE for name, _ in sharded.gets()) == 1, "what is whole is not fetched again"


def test_a_damaged_shard_is_fetched_again(sharded: Any, job: Any, tmp_path: Path) -> None:
    fetch(job(sharded.address))
    (tmp_path / "store/adapters" / REVISION / ONE).unlink()
    assert fetch(job(sharded.address)) == REVISION
    assert stored(tmp_path, REVISION) == CONTENTS
    (tmp_path / "store/adapters" / REVISION / "more").write_bytes(b"")
    assert fetch(job(sharded.address)) == REVISION
    assert stored(tmp_path, REVISION) == CONTENTS


def test_the_cap_is_on_all_shards(sharded: Any, job: Any) -> None:
    assert fetch(job(sharded.address, len(WEIGHTS))) == REVISION
    sharded.etags = dict.fromkeys(sharded.files, '"other"')
    with pytest.raises(MalformedAdapter, match=f"{TWO} has {len(SHARDED[TWO])} bytes, .* at most"):
        fetch(job(sharded.address, len(WEIGHTS) - 1))


def test_the_cap_is_on_shards_that_do_not_tell_their_size(sharded: Any, job: Any) -> None:
    def spoil(handler: Any, path: str, offset: int) -> bool:
        if not path.endswith((ONE, TWO)):
            return False
        handler.answer(200, sharded.files[path], -1, ETag='"one"')
        return True

    sharded.spoil = spoil
    assert fetch(job(sharded.address, len(WEIGHTS))) == REVISION
    sharded.etags = dict.fromkeys(sharded.files, '"other"')
    sharded.spoil = lambda *asked: spoil(*asked)
    with pytest.raises(MalformedAdapter, match=f"{TWO} has more than"):
        fetch(job(sharded.address, len(WEIGHTS) - 1))


def index(name: str) -> bytes:
    return json.dumps({"weight_map": {"a": name}}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (index("../../secret"), "names the file"),
        (index("/etc/passwd"), "names the file"),
        (index("https://example.org/x"), "names the file"),
        (index(shard_name(1, 99_999)), "one of 99999 files"),
        (index(shard_name(1, 2)), f"no tensor in {TWO}"),
        (b"{", "not valid JSON"),
        (b"[" * 99, "nested deeper"),
        (b"[" * 1_000_000, "more than 262144 values"),
        (b" " * (MAX_INDEX_BYTES + 1), f"{INDEX_NAME} has {MAX_INDEX_BYTES + 1} bytes"),
    ],
)
def test_hostile_indexes(sharded: Any, job: Any, content: bytes, message: str) -> None:
    sharded.files[f"/mine/a/{INDEX_NAME}"] = content
    with pytest.raises(MalformedAdapter, match=message):
        fetch(job(sharded.address))
    assert not any("of-" in path for _, path, _ in sharded.asked), "no shard is asked for"


def test_a_missing_shard_and_a_missing_everything(sharded: Any, job: Any) -> None:
    del sharded.files[f"/mine/a/{ONE}"]
    with pytest.raises(NotFound, match=f"has no {ONE}"):
        fetch(job(sharded.address))
    del sharded.files[f"/mine/a/{INDEX_NAME}"]
    with pytest.raises(NotFound, match=f"has no {FILES[1]},"):
        fetch(job(sharded.address))


def test_from_a_bucket(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in CONTENTS.items():
        memory.pipe_file(f"/bucket/team/sharded/{name}", content)
    monkeypatch.setattr(filesystem, "open_folder", lambda source: Folder(memory, source))
    try:
        assert fetch(job("s3://bucket/team/sharded")) == fetch(job("s3://bucket/team/sharded")) == REVISION
        assert stored(tmp_path, REVISION) == CONTENTS
    finally:
        memory.rm("/bucket", recursive=True)
