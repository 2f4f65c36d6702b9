"""A revision is computed once of files that rest, and always of those that may have changed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.reading import files
from lorry.adapters.reading.files import AdapterFiles, Place, read_adapter
from lorry.adapters.reading.revisions import Revisions, revision_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Reader:
    """Reads a folder again and again; `computed`: how often the content was hashed. later: seconds ahead of time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, later: float, most: int = 9) -> None:
        self.folder = folder
        self.computed = 0
        self.later = later
        self.revisions = Revisions(most, lambda: time.time() + self.later)

        def counted(*args: Any) -> str:
            self.computed += 1
            return revision_of(*args)

        monkeypatch.setattr(files, "revision_of", counted)

    def read(self, folder: Path | None = None, revision: str = "") -> AdapterFiles:
        folder = folder or self.folder
        found = read_adapter(Place(folder, (folder.parent,), revision), 1 << 20, self.revisions)
        content = [(name, (folder / name).read_bytes()) for name in (CONFIG, WEIGHTS)]
        assert found.revision == revision_of(content), "a revision of something else"
        return found


@pytest.fixture
def reader(write_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Long after the files were written."""
    write_adapter(tmp_path / "a")
    return Reader(tmp_path / "a", monkeypatch, later=Revisions.SETTLED + 5)


def test_files_that_rest_are_hashed_once(reader: Reader) -> None:
    first = reader.read()
    assert reader.read().revision == first.revision and reader.computed == 1


def test_files_that_were_just_written_are_hashed_again(reader: Reader) -> None:
    reader.later = Revisions.SETTLED - 5
    reader.read()
    reader.read()
    assert reader.computed == 2
    reader.later = Revisions.SETTLED + 5
    reader.read()
    reader.read()
    assert reader.computed == 3


def test_files_from_the_future_are_hashed_always(reader: Reader) -> None:
    ahead = time.time() + 3600
    os.utime(reader.folder / WEIGHTS, (ahead, ahead))
    reader.read()
    reader.read()
    assert reader.computed == 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_rewritten_in_place_with_its_size_and_its_time(reader: Reader, name: str) -> None:
    before = reader.read()
    path = reader.folder / name
    status, content = path.stat(), bytearray(path.read_bytes())
    if name == CONFIG:
        config = json.loads(content)
        content = bytearray(json.dumps(config).replace(" ", "").encode().ljust(len(content)))
    else:
        content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = path.stat()
    same = ("st_size", "st_ino", "st_mtime_ns")
    assert [getattr(now, key) for key in same] == [getattr(status, key) for key in same]
    after = reader.read()
    assert after.revision != before.revision and reader.computed == 2


def test_another_file_in_its_place(reader: Reader) -> None:
    before, path = reader.read(), reader.folder / WEIGHTS
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    aside = reader.folder / "aside"
    aside.write_bytes(content)
    os.utime(aside, ns=(status.st_atime_ns, status.st_mtime_ns))
    aside.replace(path)
    assert reader.read().revision != before.revision and reader.computed == 2


def test_the_same_weights_beside_another_config(reader: Reader) -> None:
    before = reader.read()
    other = reader.folder.parent / "b"
    other.mkdir()
    config = json.loads((reader.folder / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps(config | {"lora_alpha": 99}))
    os.link(reader.folder / WEIGHTS, other / WEIGHTS)
    assert reader.read(other).revision != before.revision


def test_a_change_while_the_content_is_hashed(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes too late for that content, and before the next read."""
    counted = files.revision_of

    def changed_meanwhile(*args: Any) -> str:
        revision = counted(*args)
        with (reader.folder / WEIGHTS).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x05")
        return revision

    with monkeypatch.context() as patch:
        patch.setattr(files, "revision_of", changed_meanwhile)
        place = Place(reader.folder, (reader.folder.parent,))
        before = read_adapter(place, 1 << 20, reader.revisions)
    assert reader.read().revision != before.revision


def test_a_known_revision_is_still_compared_with_the_one_expected(reader: Reader) -> None:
    first = reader.read()
    assert reader.read(revision=first.revision).revision == first.revision
    with pytest.raises(MalformedAdapter, match="damaged"):
        reader.read(revision="0" * 64)
    assert reader.computed == 1


def test_only_the_last_are_kept(write_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_adapter(tmp_path / f"a{number}", seed=number)
    reader = Reader(tmp_path / "a0", monkeypatch, Revisions.SETTLED + 5, most=2)
    for number, computed in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        reader.read(tmp_path / f"a{number}")
        assert reader.computed == computed, f"a{number}"
