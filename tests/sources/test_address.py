"""Addresses are parsed strictly, and prefixes hold at the bounds of components."""

from __future__ import annotations

import importlib.util

import pytest

from lorry.server.errors import PathRefused
from lorry.server.sources.address import Allowed, Source, is_address, parse


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf://org/name", Source("hf", ("org", "name"))),
        ("hf://org/name@v1.0/sub/folder/", Source("hf", ("org", "name", "sub", "folder"), "v1.0")),
        ("hf://org/name@refs/pr/3", Source("hf", ("org", "name"), "refs/pr/3")),
        ("hf://org/name@refs/convert/main/sub", Source("hf", ("org", "name", "sub"), "refs/convert/main")),
        ("hf://org/name@refs/heads/x", Source("hf", ("org", "name", "heads", "x"), "refs")),
        ("s3://my.bucket/a/b", Source("s3", ("my.bucket", "a", "b"))),
        ("gs://my_bucket/a/", Source("gs", ("my_bucket", "a"))),
        ("https://Example.org:443/A", Source("https", ("example.org", "A"))),
        ("https://example.org:8443/a", Source("https", ("example.org:8443", "a"))),
    ],
)
def test_addresses(text: str, source: Source) -> None:
    assert parse(text) == source
    assert parse(str(source)) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://example.org/a", "scheme 'http' is not one of hf, s3, gs, https"),
        ("HTTPS://example.org/a", "scheme 'HTTPS'"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("https://user:secret@example.org/a", "bears no credentials"),
        ("s3://key@bucket/a", "bears no credentials"),
        ("https://example.org/a?token=secret", "no query"),
        ("https://example.org/a#b", "no fragment"),
        ("https://example.org/a/../b", "'..' is no component"),
        ("https://example.org/./b", "'.' is no component"),
        ("https://example.org/%2e%2e/b", "'%2e%2e' is no component"),
        ("https://example.org//b", "'' is no component"),
        ("https://example.org/a//", "'' is no component"),
        ("https://example.org/a b", "'a b' is no component"),
        ("https://example.org/a\n", "is no component"),
        ("https://example.org\\@evil.org/a", "bears no credentials"),
        ("https://example.org\\.evil.org/a", "no host for https"),
        ("https://[::1]/a", "no host for https"),
        ("https://example.org/", "names no folder"),
        ("https:///a", "no host for https"),
        ("s3://bucket", "names no folder"),
        ("s3://../a", "no name for s3"),
        ("hf://name", "names no folder"),
        ("hf://org/name@", "no revision"),
        ("hf://org/name@..", "no revision"),
        ("hf://org/name@a@b", "no revision"),
        ("hf://org/name@refs/pr/..", "no revision"),
        ("hf://org/na*me", "is no component"),
    ],
)
def test_wrong_forms(text: str, message: str) -> None:
    assert is_address(text)
    with pytest.raises(PathRefused, match=message) as refused:
        parse(text)
    assert refused.value.fields == {"field": "path"}
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("path", ["a/b", "a:b", "/a", "./hf:/a", "://a", "1://a"])
def test_local_paths_are_no_addresses(path: str) -> None:
    assert not is_address(path)


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        (
            "https://example.org/a",
            ["https://example.org/a", "https://example.org/a/b/", "https://EXAMPLE.org:443/a/b"],
            [
                "https://example.org/ab",
                "https://example.org.evil/a",
                "https://example.org:8443/a",
                "hf://example.org/a",
            ],
        ),
        ("https://example.org", ["https://example.org/a"], ["https://sub.example.org/a", "https://example.org.evil/a"]),
        ("hf://org", ["hf://org/name", "hf://org/name@main/sub"], ["hf://organ/name", "s3://org/name"]),
        ("hf://org", ["hf://org/name@refs/convert/x"], ["hf://org/name@refs/pr/3"]),
        ("hf://org/name@refs/pr/3", ["hf://org/name@refs/pr/3/a"], ["hf://org/name@refs/pr/4", "hf://org/name"]),
        ("hf://org/name@v1", ["hf://org/name@v1/sub"], ["hf://org/name", "hf://org/name@v2", "hf://org/name2@v1"]),
        ("s3://bucket/team/", ["s3://bucket/team/a"], ["s3://bucket/teams/a", "gs://bucket/team/a", "s3://bucket/x"]),
    ],
)
def test_prefixes(prefix: str, inside: list[str], outside: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    allowed = Allowed([prefix])
    for text in inside:
        assert allowed.check(text) == parse(text)
    for text in outside:
        with pytest.raises(PathRefused, match="no --adapter-source of this server allows"):
            allowed.check(text)
        with pytest.raises(PathRefused):
            Allowed([]).check(text)


def test_a_prefix_is_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix in ("hf://", "https://", "example.org", "http://example.org", "s3://b/*"):
        with pytest.raises(PathRefused):
            Allowed([prefix])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PathRefused, match=r"s3:// needs the package s3fs; install lorry\[s3\]"):
        Allowed(["s3://bucket"])
