"""Downloads from a server that speaks as much of the hub's protocol as huggingface_hub asks for; and its errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from web_site import CONFIG, SHARDED, WEIGHTS

from lorry.adapters.reading import files
from lorry.adapters.reading.shards import INDEX_NAME
from lorry.server.errors import LorryError, MalformedAdapter, NotFound, PathRefused, SourceUnavailable
from lorry.server.sources.fetch import fetch, reason
from lorry.server.sources.store import FILES

REVISION = files.revision_of(((FILES[0], CONFIG), (FILES[1], WEIGHTS)))
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs%2Fpr%2F3": "e" * 40}


class Hub:
    """The repository org/name, whose commits hold the same two files at the top and below sub/."""

    def __init__(self, site: Any) -> None:
        self.site = site
        self.site.files, self.site.spoil = {}, self.answer
        self.contents = {FILES[0]: CONFIG, FILES[1]: WEIGHTS}
        self.digest = hashlib.sha256(WEIGHTS).hexdigest()
        self.told = len(WEIGHTS)
        self.cuts = 0
        self.commits: list[str] = []

    def answer(self, handler: Any, path: str, offset: int) -> bool:
        parts = path.split("?")[0].strip("/").split("/")
        send = lambda value: handler.answer(200, json.dumps(value).encode(), Content_Type="application/json")
        match parts:
            case ["api", "models", "org", "name", "revision", revision] if revision in COMMITS:
                send({"id": "org/name", "sha": COMMITS[revision], "siblings": []})
            case ["api", "models", "org", "name", "paths-info", commit]:
                self.commits.append(commit)
                length = int(handler.headers["Content-Length"])
                (asked,) = parse_qs(handler.rfile.read(length).decode())["paths"]
                send([self.info(asked)] if asked.rsplit("/", 1)[-1] in self.contents else [])
            case ["org", "name", "resolve", commit, *_, name] if commit in COMMITS.values() and name in self.contents:
                self.content(handler, commit, name)
            case _:
                handler.answer(404, b"", X_Error_Code="RepoNotFound")
        return True

    def info(self, path: str) -> dict[str, Any]:
        if path.endswith(FILES[0]):
            return {"type": "file", "path": path, "size": len(CONFIG), "oid": "c" * 40}
        if not path.endswith(FILES[1]):
            content = self.contents[path.rsplit("/", 1)[-1]]
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        lfs = {"oid": self.digest, "sha256": self.digest, "size": self.told, "pointerSize": 130}
        return {"type": "file", "path": path, "size": self.told, "oid": "d" * 40, "lfs": lfs}

    def content(self, handler: Any, commit: str, name: str) -> None:
        content = self.contents[name]
        begin = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit}
        if begin:
            headers["Content_Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        body = content[begin:]
        if handler.command == "GET" and name == FILES[1] and self.cuts:
            self.cuts -= 1
            handler.close_connection = True
            body = body[:100_001]
        handler.answer(206 if begin else 200, body, len(content) - begin, **headers)


@pytest.fixture
def hub(site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    endpoint = f"http://127.0.0.1:{site.port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    huggingface_hub.close_session()
    yield Hub(site)
    huggingface_hub.close_session()


def downloads(hub: Hub) -> list[str]:
    return [path.rsplit("/", 1)[1] for method, path, _ in hub.site.asked if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize(
    ("address", "commit"),
    [
        ("hf://org/name", "main"),
        ("hf://org/name@v1", "v1"),
        ("hf://org/name@v1/sub", "v1"),
        ("hf://org/name@refs/pr/3", "refs%2Fpr%2F3"),
    ],
)
def test_a_repository(hub: Hub, job: Any, tmp_path: Path, address: str, commit: str) -> None:
    assert fetch(job(address)) == fetch(job(address)) == REVISION
    folder = tmp_path / "store/adapters" / REVISION
    assert [(folder / name).read_bytes() for name in FILES] == [CONFIG, WEIGHTS]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert sorted(downloads(hub)) == sorted(FILES), "the second time they are here"
    assert set(hub.commits) == {COMMITS[commit]}


@pytest.mark.parametrize("address", ["hf://org/name", "hf://org/name@v1/sub"])
def test_shards(hub: Hub, job: Any, tmp_path: Path, address: str) -> None:
    hub.contents = {FILES[0]: CONFIG} | SHARDED
    revision = fetch(job(address))
    assert revision == fetch(job(address)) == files.revision_of(tuple(hub.contents.items()))
    folder = tmp_path / "store/adapters" / revision
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hub.contents
    assert sorted(downloads(hub)) == sorted([*hub.contents, INDEX_NAME]), "the second time only the index comes"


def test_a_download_that_breaks_goes_on(hub: Hub, job: Any) -> None:
    hub.cuts = 1
    assert fetch(job("hf://org/name")) == REVISION


def test_a_wrong_digest(hub: Hub, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorry.server.sources.fetch.ATTEMPTS", 2)
    hub.digest = "0" * 64
    with pytest.raises(SourceUnavailable, match="changes while it is fetched"):
        fetch(job("hf://org/name"))


def test_too_large(hub: Hub, job: Any) -> None:
    hub.told = 1 << 40
    with pytest.raises(MalformedAdapter, match="at most 326551"):
        fetch(job("hf://org/name"))
    assert downloads(hub) == []


def test_the_token_is_sent_and_a_gated_repository_says_so(hub: Hub, job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: set[str | None] = set()
    answer = hub.site.spoil

    def guarded(handler: Any, path: str, offset: int) -> bool:
        tokens.add(handler.headers.get("Authorization"))
        if handler.headers.get("Authorization") == "Bearer hf_mine":
            return answer(handler, path, offset)
        handler.answer(403, b"", X_Error_Code="GatedRepo")
        return True

    hub.site.spoil = guarded
    with pytest.raises(PathRefused, match=r"the repository is gated: .* HF_TOKEN"):
        fetch(job("hf://org/name"))
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    tokens.clear()
    assert fetch(job("hf://org/name")) == REVISION
    assert tokens == {"Bearer hf_mine"}


def test_no_name_of_a_repository(hub: Hub, job: Any) -> None:
    with pytest.raises(PathRefused, match="no repository of such a name"):
        fetch(job("hf://org/a--b"))


@pytest.mark.parametrize("address", ["hf://org/other", "hf://org/name@v9"])
def test_what_is_not_there(hub: Hub, job: Any, address: str) -> None:
    with pytest.raises(NotFound, match=f"{address} has no"):
        fetch(job(address))


def test_the_reason_bears_no_credentials() -> None:
    error = SourceUnavailable("m")
    assert reason(error) == ""
    error.__cause__ = OSError("at https://me:secret@example.org/a?x=secret&y=secret and more")
    assert reason(error) == "OSError: at https://…@example.org/a?… and more"


def failing(error: type[Exception], status: int) -> Exception:
    """An error of the library as it comes with a response."""
    raised = error.__new__(error)
    Exception.__init__(raised, "at https://cdn.example.org/x?signature=secret")
    raised.response = type("Response", (), {"status_code": status})()  # type: ignore[attr-defined]
    return raised


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (failing(errors.GatedRepoError, 403), PathRefused),
        (failing(errors.RepositoryNotFoundError, 401), NotFound),
        (failing(errors.HfHubHTTPError, 401), PathRefused),
        (failing(errors.HfHubHTTPError, 503), SourceUnavailable),
        (failing(errors.HfHubHTTPError, 400), SourceUnavailable),
        (errors.LocalEntryNotFoundError("offline"), SourceUnavailable),
        (errors.OfflineModeIsEnabled("offline"), SourceUnavailable),
        (RuntimeError("a bug at https://cdn.example.org/x?signature=secret"), SourceUnavailable),
    ],
)
def test_errors_of_the_library(
    error: Exception,
    ours: type[LorryError],
    job: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ours) as raised:
        fetch(job("hf://org/name"))
    assert type(raised.value) is ours
    assert "secret" not in str(raised.value.fields) + raised.value.message + reason(raised.value)
