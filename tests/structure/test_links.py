"""Links hold: the ones that make the top-level folders one package, and those between the pages of the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PACKAGE_LINKS = {
    "src/lorry/adapters": "../../adapters",
    "src/lorry/kernels": "../../kernels",
    "src/lorry/server": "../../server",
    "src/lorry/v1": "../../protos/lorry/v1",
}

_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+\s+(.*?)\s*$", re.MULTILINE)


def pages(root: Path) -> list[Path]:
    """The Markdown pages of the repository."""
    found = [*root.glob("*.md")]
    for folder in ("bench", "deploy", "docs", "examples"):
        found += (root / folder).rglob("*.md")
    return sorted(found)


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked."""
    names = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return names


def broken_links(root: Path) -> list[str]:
    """One line for every relative link of a page whose file or heading is not there."""
    found = []
    for page in pages(root):
        for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            where = f"{page.relative_to(root)}: {link}"
            if not target.is_relative_to(root) or not target.exists():
                found.append(f"{where}: no such file")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                found.append(f"{where}: no such heading")
    return found


@pytest.mark.parametrize(("link", "target"), PACKAGE_LINKS.items())
def test_package_link(link: str, target: str) -> None:
    path = ROOT / link
    assert path.is_symlink(), f"{link} is not a link: was the repository copied without its links?"
    assert path.readlink() == Path(target)
    assert path.is_dir()


@pytest.mark.parametrize("folder", ["server", "kernels", "adapters", "protos/lorry/v1"])
def test_linked_folders_have_no_init_of_their_own(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_other_link_is_committed() -> None:
    listing = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    links = {line.split("\t")[1] for line in listing.stdout.splitlines() if line.startswith("120000")}
    assert links == set(PACKAGE_LINKS)


def test_links_between_pages() -> None:
    assert pages(ROOT)
    assert broken_links(ROOT) == []


def test_a_broken_link_is_reported(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# One `two`: three\n\n[up](../README.md#title) [me](#one-two-three)\n")
    (tmp_path / "README.md").write_text(
        "# Title\n[a](docs/a.md) [b](docs/b.md) [c](docs/a.md#four) [web](https://example.org)\n"
        "```\n[code](nowhere.md)\n```\n[out](../../etc)\n"
    )
    assert broken_links(tmp_path) == [
        "README.md: docs/b.md: no such file",
        "README.md: docs/a.md#four: no such heading",
        "README.md: ../../etc: no such file",
    ]
