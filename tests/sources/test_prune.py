"""What goes from the store when there is too much, and what never does, whoever shares it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from web_site import CONFIG, WEIGHTS

from lorry.server.sources import fetch
from lorry.server.sources.prune import ABANDONED_SECONDS, RECENT_SECONDS, prune
from lorry.server.sources.store import FILES, Store
from lorry.server.sources.uses import Uses, in_use

SIZE = len(b"{}") + 1001


def kept(store: Store, root: Path, number: int, used: float) -> str:
    """A revision of SIZE bytes whose last use was `used` seconds after the epoch."""
    key = f"key-{number}"
    for name, content in zip(FILES, (b"{}", bytes([number]) * 1001), strict=True):
        (store.part(key) / name).write_bytes(content)
    revision = store.keep(key)
    os.utime(root / "adapters" / revision, (used, used))
    return revision


@pytest.fixture
def five(tmp_path: Path) -> list[str]:
    """Five revisions, the first used longest ago."""
    store = Store(tmp_path)
    return [kept(store, tmp_path, number, 1000.0 + number) for number in range(5)]


def there(root: Path) -> set[str]:
    return {path.name for path in (root / "adapters").iterdir()}


NOW = 1e9


@pytest.mark.parametrize(("most", "left"), [(None, 5), (5 * SIZE, 5), (5 * SIZE - 1, 4), (2 * SIZE, 2), (0, 0)])
def test_those_used_longest_ago_go_first(tmp_path: Path, five: list[str], most: int | None, left: int) -> None:
    assert prune(tmp_path, most, NOW) == five[: 5 - left]
    assert there(tmp_path) == set(five[5 - left :])
    assert {note.read_text() for note in (tmp_path / "versions").iterdir()} == set(five[5 - left :])
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.is_dir()] == []


def test_a_find_is_a_use(tmp_path: Path, five: list[str]) -> None:
    store = Store(tmp_path)
    assert store.find("key-0") == five[0]
    assert prune(tmp_path, SIZE) == five[1:]
    assert store.find("key-0") == five[0] and store.find("key-1") is None


def test_what_was_used_a_moment_ago_stays(tmp_path: Path, five: list[str]) -> None:
    assert prune(tmp_path, 0, 1002.0 + RECENT_SECONDS) == five[:2]
    assert there(tmp_path) == set(five[2:])


def test_what_a_server_has_loaded_stays(tmp_path: Path, five: list[str]) -> None:
    ours, theirs = Uses(tmp_path), Uses(tmp_path)
    ours.replace({five[0], five[1]})
    theirs.replace({five[1], five[2]})
    for revision in five[:3]:
        os.utime(tmp_path / "adapters" / revision, (1.0, 1.0))
    assert in_use(tmp_path) == set(five[:3])
    assert prune(tmp_path, 0, NOW) == five[3:]
    ours.replace({five[0]})
    os.utime(tmp_path / "adapters" / five[1], (1.0, 1.0))
    assert prune(tmp_path, 0, NOW) == [], "the other still has it"
    theirs.close()
    assert set(prune(tmp_path, 0, 2e10)) == set(five[1:3])
    assert there(tmp_path) == {five[0]}
    ours.close()
    assert list((tmp_path / "servers").iterdir()) == []


def test_the_end_of_a_use_is_a_use(tmp_path: Path, five: list[str]) -> None:
    uses = Uses(tmp_path)
    uses.replace({five[0]})
    os.utime(tmp_path / "adapters" / five[0], (1.0, 1.0))
    uses.replace(())
    assert prune(tmp_path, 0) == five[1:], "a stream may be in flight"
    uses.close()


def test_a_server_that_died_holds_nothing(tmp_path: Path, five: list[str]) -> None:
    script = (
        "import os, sys, pathlib; from lorry.server.sources.uses import Uses;"
        "Uses(pathlib.Path(sys.argv[1])).replace([sys.argv[2]]); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), five[4]], check=False, timeout=60)
    assert len(list((tmp_path / "servers").glob("*.lock"))) == 1
    assert in_use(tmp_path) == set()
    assert list((tmp_path / "servers").iterdir()) == []


def test_partial_downloads(tmp_path: Path, five: list[str]) -> None:
    store = Store(tmp_path)
    ages = {"of-yesterday": ABANDONED_SECONDS + 1, "older": RECENT_SECONDS + 1, "recent": 1.0, "busy": 1e8}
    for name, age in ages.items():
        part = store.part(name) / FILES[1]
        part.write_bytes(bytes(999))
        for path in (part, part.parent):
            os.utime(path, (NOW - age, NOW - age))
    with store.locked("busy"):
        left = lambda: sorted(path.name for path in (tmp_path / "parts").iterdir() if path.is_dir())
        assert prune(tmp_path, None, NOW) == [] and left() == ["busy", "older", "recent"]
        assert prune(tmp_path, 5 * SIZE + 2 * 999, NOW) == [] and left() == ["busy", "recent"]
        assert prune(tmp_path, 0, NOW) == five and left() == ["busy", "recent"]


def test_one_prunes_at_a_time(tmp_path: Path, five: list[str]) -> None:
    import fcntl

    with open(tmp_path / "prune.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert prune(tmp_path, 0, NOW) == []
    assert prune(tmp_path, 0, NOW) == five


def test_a_download_makes_room(
    site: Any, job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes is never what goes."""
    from dataclasses import replace

    old = kept(Store(tmp_path / "store"), tmp_path / "store", 1, 1.0)
    asked = replace(job(site.address), cache_bytes=len(CONFIG) + len(WEIGHTS))
    revision = fetch.fetch(asked)
    assert there(tmp_path / "store") == {old, revision}
    fetch._prune(asked)
    assert there(tmp_path / "store") == {revision}
    fetch._prune(replace(asked, cache_bytes=1))
    assert there(tmp_path / "store") == {revision}
