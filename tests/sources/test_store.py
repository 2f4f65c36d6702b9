"""Folders named by their content: proved, replaced when damaged, shared by versions and processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lorry.adapters.reading import files
from lorry.server.sources.store import FILES, Store, default_root, revision_of

CONTENTS = (b"{}", b"weights" * 1001)
REVISION = files.revision_of(tuple(zip(FILES, CONTENTS, strict=True)))


def gather(store: Store, key: str) -> None:
    for name, content in zip(FILES, CONTENTS, strict=True):
        (store.part(key) / name).write_bytes(content)


def test_a_revision_is_what_the_engine_computes(tmp_path: Path) -> None:
    gather(store := Store(tmp_path), "k")
    assert revision_of(store.part("k")) == REVISION


def test_versions_of_one_content_share_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("one", "two"):
        assert store.find(key) is None
        gather(store, key)
        assert store.keep(key) == REVISION == store.find(key)
    (folder,) = (tmp_path / "adapters").iterdir()
    assert folder.name == REVISION and sorted(os.listdir(folder)) == sorted(FILES)
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} == {".lock"}


@pytest.mark.parametrize("damage", ["bytes", "missing", "link", "pipe", "note"])
def test_a_damaged_folder_is_replaced(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    gather(store, "k")
    store.keep("k")
    file = tmp_path / "adapters" / REVISION / FILES[1]
    if damage == "note":
        (tmp_path / "versions/k").write_text("../../elsewhere")
    elif damage == "bytes":
        file.write_bytes(CONTENTS[1][:-1])
    else:
        file.unlink()
        if damage == "link":
            (tmp_path / "x").write_bytes(CONTENTS[1])
            file.symlink_to(tmp_path / "x")
        elif damage == "pipe":
            os.mkfifo(file)
    assert store.find("k") is None
    gather(store, "k")
    assert store.keep("k") == REVISION == store.find("k")


def test_one_at_a_time(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with Store(tmp_path).locked("k"):
            entered.set()

    with Store(tmp_path).locked("k"):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(60)
    thread.join()


def test_the_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "lorry/sources"
