"""Downloads from web servers, good and bad ones."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from web_site import CONFIG, WEIGHTS

from lorry.adapters.reading import files
from lorry.server.errors import LorryError, MalformedAdapter, NotFound, PathRefused, SourceUnavailable
from lorry.server.sources import https
from lorry.server.sources.fetch import ATTEMPTS, fetch
from lorry.server.sources.store import FILES

REVISION = files.revision_of(((FILES[0], CONFIG), (FILES[1], WEIGHTS)))


def fetched(root: Path, revision: str) -> list[bytes]:
    folder = root / "store/adapters" / revision
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return [(folder / name).read_bytes() for name in FILES]


def test_two_files_come_and_are_not_fetched_twice(site: Any, job: Any, tmp_path: Path) -> None:
    assert fetch(job(site.address)) == REVISION
    assert fetched(tmp_path, REVISION) == [CONFIG, WEIGHTS]
    assert site.gets() == [(FILES[0], ""), (FILES[1], "")]
    assert fetch(job(site.address)) == REVISION
    assert len(site.gets()) == 2
    assert {path.suffix for path in (tmp_path / "store/parts").iterdir()} == {".lock"}


def test_a_damaged_copy_is_fetched_again(site: Any, job: Any, tmp_path: Path) -> None:
    fetch(job(site.address))
    file = tmp_path / "store/adapters" / REVISION / FILES[1]
    file.write_bytes(WEIGHTS[:-1] + b"?")
    assert fetch(job(site.address)) == REVISION
    assert fetched(tmp_path, REVISION) == [CONFIG, WEIGHTS]
    assert len(site.gets()) == 4
    file.unlink()
    assert fetch(job(site.address)) == REVISION
    assert fetched(tmp_path, REVISION) == [CONFIG, WEIGHTS]


def test_a_new_version_is_another_folder(site: Any, job: Any, tmp_path: Path) -> None:
    fetch(job(site.address))
    path = f"/mine/a/{FILES[1]}"
    site.files[path], site.etags[path] = WEIGHTS[::-1], '"two"'
    revision = fetch(job(site.address))
    assert revision != REVISION
    assert fetched(tmp_path, revision) == [CONFIG, WEIGHTS[::-1]]
    assert fetched(tmp_path, REVISION) == [CONFIG, WEIGHTS]


def test_what_has_no_version_is_fetched_each_time(site: Any, job: Any, tmp_path: Path) -> None:
    site.etags = dict.fromkeys(site.files, "")
    assert fetch(job(site.address)) == fetch(job(site.address)) == REVISION
    assert fetched(tmp_path, REVISION) == [CONFIG, WEIGHTS]
    assert len(site.gets()) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_truncated_body_is_continued(site: Any, job: Any, tmp_path: Path, ranges: bool) -> None:
    cut: list[int] = []

    def spoil(handler: Any, path: str, offset: int) -> bool:
        if handler.command == "HEAD" or path.endswith(".json") or len(cut) == 2:
            return False
        cut.append(offset)
        span = f"bytes {offset}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
        headers = {"ETag": '"one"'} | ({"Content_Range": span} if offset else {})
        handler.answer(206 if offset else 200, WEIGHTS[offset : offset + 100_001], len(WEIGHTS) - offset, **headers)
        time.sleep(0.1)  # what was sent is read before the end of the connection is noticed
        handler.close_connection = True
        return True

    site.spoil, site.ranges = spoil, ranges
    assert fetch(job(site.address)) == REVISION
    assert fetched(tmp_path, REVISION) == [CONFIG, WEIGHTS]
    starts = [int(range.strip("bytes=-") or 0) for name, range in site.gets() if name == FILES[1]]
    assert starts == [0, 100_001, 200_002 if ranges else 100_001]
    assert cut == ([0, 100_001] if ranges else [0, 0])


def test_a_file_that_changes_midway_is_begun_again(site: Any, job: Any, tmp_path: Path) -> None:
    path, calls = f"/mine/a/{FILES[1]}", []

    def spoil(handler: Any, asked: str, offset: int) -> bool:
        if handler.command == "HEAD" or asked != path or calls:
            return False
        calls.append(offset)
        handler.answer(200, WEIGHTS[:100_001], len(WEIGHTS), ETag='"one"')
        handler.close_connection = True
        site.files[path], site.etags[path] = WEIGHTS[::-1], '"two"'
        return True

    site.spoil = spoil
    assert fetched(tmp_path, fetch(job(site.address))) == [CONFIG, WEIGHTS[::-1]]


def answers(status: int, times: int = 1 << 30, **headers: str) -> Any:
    """A `spoil` that answers so a number of times, then lets the site answer."""
    seen: list[str] = []

    def spoil(handler: Any, path: str, offset: int) -> bool:
        seen.append(path)
        if len(seen) <= times:
            handler.answer(status, b"a body that is no adapter", **headers)
        return len(seen) <= times

    spoil.seen = seen  # type: ignore[attr-defined]
    return spoil


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_errors_pass(site: Any, job: Any, status: int) -> None:
    site.spoil = answers(status, times=5)
    assert fetch(job(site.address)) == REVISION


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, NotFound, "has no adapter_config.json"),
        (403, PathRefused, "refuses access"),
        (302, PathRefused, "redirects adapter_config.json to another place"),
        (308, PathRefused, "redirects adapter_config.json to another place"),
        (503, SourceUnavailable, "cannot be fetched now"),
        (418, SourceUnavailable, "cannot be fetched now"),
    ],
)
def test_lasting_errors(site: Any, job: Any, status: int, error: type[LorryError], message: str) -> None:
    site.spoil = answers(status, Location="https://example.org/?signature=secret")
    with pytest.raises(error, match=message) as raised:
        fetch(job(site.address))
    assert type(raised.value) is error and "secret" not in str(raised.value.fields) + raised.value.message
    tries = sum(path.endswith(".json") for path in site.spoil.seen)
    assert tries == (2 * ATTEMPTS if status == 503 else 2), "HEAD and GET"


def test_a_server_that_cannot_go_on_begins_again(site: Any, job: Any, tmp_path: Path) -> None:
    """It answers 416 to any range, though its file has not changed."""
    cut: list[int] = []

    def spoil(handler: Any, path: str, offset: int) -> bool:
        if handler.command == "HEAD" or path.endswith(".json"):
            return False
        if handler.headers.get("Range"):
            handler.answer(416, b"")
            return True
        if not cut:
            cut.append(offset)
            handler.answer(200, WEIGHTS[:100_001], len(WEIGHTS), ETag='"one"')
            time.sleep(0.1)  # what was sent is read before the end of the connection is noticed
            handler.close_connection = True
            return True
        return False

    site.spoil = spoil
    assert fetched(tmp_path, fetch(job(site.address))) == [CONFIG, WEIGHTS]
    assert [range for name, range in site.gets() if name == FILES[1]] == ["", "bytes=100001-", ""]


def test_a_redirect_midway_is_no_content(site: Any, job: Any) -> None:
    def spoil(handler: Any, path: str, offset: int) -> bool:
        if handler.command == "GET" and path.endswith(FILES[1]):
            handler.answer(302, WEIGHTS, Location=path)
            return True
        return False

    site.spoil = spoil
    with pytest.raises(PathRefused, match=re.escape(f"redirects {FILES[1]}")):
        fetch(job(site.address))


def test_weights_that_are_missing(site: Any, job: Any) -> None:
    del site.files[f"/mine/a/{FILES[1]}"]
    with pytest.raises(NotFound, match=f"has no {FILES[1]}"):
        fetch(job(site.address))


def test_no_server(job: Any, site: Any) -> None:
    with pytest.raises(SourceUnavailable):
        fetch(job("https://127.0.0.1:9/a"))


def test_a_file_above_the_limit_is_not_begun(site: Any, job: Any) -> None:
    with pytest.raises(MalformedAdapter, match=f"{FILES[1]} has {len(WEIGHTS)} bytes, .* at most 1000") as refused:
        fetch(job(site.address, 1000))
    assert refused.value.fields["field"] == FILES[1] and site.gets() == []


@pytest.mark.parametrize("told", [1000, None])
def test_a_server_that_sends_more_is_cut(site: Any, job: Any, told: int | None) -> None:
    """It tells 1000 bytes or nothing, and would send 2**40."""
    sent: list[int] = []

    def spoil(handler: Any, path: str, offset: int) -> bool:
        if path.endswith(".json"):
            return False
        if handler.command == "HEAD" and told is not None:
            handler.answer(200, b"", told, ETag='"one"')
            return True
        handler.answer(200, b"", -1, ETag='"one"')
        if handler.command == "GET":
            try:
                for _ in range(1 << 20):
                    handler.wfile.write(bytes(1 << 20))
                    sent.append(1 << 20)
            except OSError:
                pass
        return True

    site.spoil = spoil
    message = "sends more of .* than the 1000 bytes it told" if told else "has more than 326551 bytes"
    with pytest.raises(MalformedAdapter, match=message):
        fetch(job(site.address))
    assert sum(sent) < 64 << 20


def test_a_silent_server(site: Any, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(https.Folder.__init__, "__defaults__", (False, 0.05))
    calls: list[str] = []

    def spoil(handler: Any, path: str, offset: int) -> bool:
        if handler.command == "GET" and path.endswith(FILES[1]) and not calls:
            calls.append(path)
            handler.answer(200, WEIGHTS[:1001], len(WEIGHTS), ETag='"one"')
            time.sleep(0.2)
            handler.close_connection = True
            return True
        return False

    site.spoil = spoil
    assert fetch(job(site.address)) == REVISION
    assert (FILES[1], "bytes=1001-") in site.gets()


def test_only_this_machine_is_asked_without_tls() -> None:
    from lorry.server.sources.address import parse

    assert https.Folder(parse("https://example.org/a"), plain=True)._url == "https://example.org/a"
    assert https.Folder(parse("https://127.0.0.1/a"))._url == "https://127.0.0.1/a"
