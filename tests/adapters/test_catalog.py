"""Ids and paths: what is an adapter's name, and which folders a client may mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorry.adapters.catalog import Catalog, is_valid_id
from lorry.adapters.errors import PathRefused


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "..a", "...", "x" * 64])
def test_valid_ids(name: str) -> None:
    assert is_valid_id(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "a\n", "x" * 65, "a\0"])
def test_invalid_ids(name: str) -> None:
    assert not is_valid_id(name)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """dir/{a, b→roots/c, out→outside, file, .hidden, no id!}, roots/{c, deep/d, loop→loop}, outside/"""
    for folder in ("dir/a", "dir/.hidden", "dir/no id!", "roots/c", "roots/deep/d", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dir/file").touch()
    (tmp_path / "dir/b").symlink_to(tmp_path / "roots/c")
    (tmp_path / "dir/out").symlink_to(tmp_path / "outside")
    (tmp_path / "roots/loop").symlink_to(tmp_path / "roots/loop")
    return tmp_path


def test_sub_folders_are_adapters(tree: Path) -> None:
    catalog = Catalog(tree / "dir", [tree / "roots"])
    found = catalog.scan()
    assert list(found) == ["a", "b"]
    assert found["b"].folder == (tree / "roots/c").resolve()
    assert list(Catalog(tree / "dir").scan()) == ["a"], "a link may not leave the roots"
    (tree / "dir/later").mkdir()
    assert catalog.find("later") is not None
    assert catalog.find("file") is None and catalog.find("out") is None and catalog.find("..") is None


def test_a_missing_folder_has_no_adapters(tmp_path: Path) -> None:
    assert Catalog(tmp_path / "nowhere").scan() == {}
    assert Catalog().scan() == {} and Catalog().find("a") is None


@pytest.mark.parametrize("path", ["a", "c", "deep/d", "./a", "b", "deep//d/"])
def test_paths_below_the_roots(tree: Path, path: str) -> None:
    folder = Catalog(tree / "dir", [tree / "roots"]).resolve(path).folder
    assert folder.is_dir() and (tree / "roots" in folder.parents or tree / "dir" in folder.parents)


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "a/..", "../outside", "a/../../outside", "out", "file", "nowhere", "loop", "a\0", "x" * 5000, "/"],
)
def test_paths_that_are_refused(tree: Path, path: str) -> None:
    with pytest.raises(PathRefused) as refused:
        Catalog(tree / "dir", [tree / "roots"]).resolve(path)
    assert str(tree) not in refused.value.message


def test_absolute_paths_and_servers_without_roots(tree: Path) -> None:
    with pytest.raises(PathRefused, match="relative"):
        Catalog(tree / "dir").resolve(str(tree / "dir/a"))
    with pytest.raises(PathRefused, match="no adapter roots"):
        Catalog().resolve("a")
