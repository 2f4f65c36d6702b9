"""Where an adapter lies that is not on this machine, and which such places an operator allows.

    hf://org/name[@revision][/folder]     s3://bucket/folder     gs://bucket/folder     https://host[:port]/folder

An address names a folder. It is parsed strictly, so that what is compared with the allowed prefixes is what is
fetched: no query, no credentials, no percent-encoding, no "." or "..", no empty component.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorry.server.errors import PathRefused

SCHEMES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "https": "aiohttp"}  # and the module that reads it
EXTRAS = {"s3": "s3", "gs": "gcs", "https": "https"}
MAIN = "main"

_SHAPES = {"hf": "hf://org/name[@revision][/folder]", "https": "https://host[:port]/folder"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_PART = re.compile(r"[A-Za-z0-9._~+=,-]+")
_FIRST = {  # host, bucket or organisation
    "hf": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*"),
    "s3": re.compile(r"[a-z0-9][a-z0-9.-]*"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]*"),
    "https": re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?"),
}


@dataclass(frozen=True)
class Source:
    """A parsed address. parts: host, bucket or organisation, then the components below it; revision: of a hub's
    repository, "" elsewhere and where none is said."""

    scheme: str
    parts: tuple[str, ...]
    revision: str = ""

    def __str__(self) -> str:
        parts = list(self.parts)
        if self.revision:
            parts[1] += f"@{self.revision}"
        return f"{self.scheme}://{'/'.join(parts)}"

    def below(self, prefix: Source) -> bool:
        """Whether this is `prefix` or lies below it; a prefix with a revision allows no other revision, and one without
        allows no pull request, which anybody may open."""
        return (
            self.scheme == prefix.scheme
            and self.parts[: len(prefix.parts)] == prefix.parts
            and (self.revision == prefix.revision or not (prefix.revision or self.revision.startswith("refs/pr/")))
        )


def is_address(path: str) -> bool:
    """Whether `path` begins as an address does, of whatever scheme; other paths are relative to local roots."""
    return _ADDRESS.fullmatch(path) is not None


def parse(text: str, prefix: bool = False) -> Source:
    """The place that `text` names; a `prefix` may stop at a host, bucket or organisation. Raises PathRefused."""
    match = _ADDRESS.fullmatch(text)
    scheme, rest = (match[1], match[2]) if match else ("", "")
    if scheme not in SCHEMES:
        raise _refused(f"the scheme {scheme[:20]!r} is not one of {', '.join(SCHEMES)}")
    if "?" in rest or "#" in rest:
        raise _refused("an address has no query and no fragment")
    parts = rest.removesuffix("/").split("/")
    if "@" in parts[0]:
        raise _refused("an address bears no credentials")
    revision = ""
    if scheme == "hf" and len(parts) > 1 and "@" in parts[1]:
        parts[1], _, revision = parts[1].partition("@")
        if revision == "refs" and len(parts) > 3 and parts[2] in ("pr", "convert"):  # of pull requests and conversions
            revision, parts = "/".join(("refs", *parts[2:4])), [*parts[:2], *parts[4:]]
        if any(_PART.fullmatch(part) is None or set(part) <= {"."} for part in revision.split("/")):
            raise _refused(f"{revision[:100]!r} is no revision of a repository")
    for part in parts[1:]:
        if _PART.fullmatch(part) is None or part in (".", ".."):
            raise _refused(f"{part[:100]!r} is no component of an address: [A-Za-z0-9._~+=,-]+, neither . nor ..")
    return _checked(scheme, parts, revision, prefix)


def _checked(scheme: str, parts: list[str], revision: str, prefix: bool) -> Source:
    first = parts[0]
    if _FIRST[scheme].fullmatch(first) is None or ".." in first:
        raise _refused(f"{first[:100]!r} is no {'host' if scheme == 'https' else 'name'} for {scheme}")
    if scheme == "https":
        parts[0] = first.lower().removesuffix(":443")
    if len(parts) < 2 and not prefix:
        shape = _SHAPES.get(scheme, f"{scheme}://bucket/folder")
        raise _refused(f"{scheme}://{first[:100]} names no folder; accepted: {shape}")
    return Source(scheme, tuple(parts), revision)


def _refused(message: str) -> PathRefused:
    return PathRefused(message, field="path")


class Allowed:
    """The prefixes below which adapters may be fetched; none: nowhere."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        """Raises PathRefused for what is no prefix, and for a scheme whose library is not installed."""
        self.prefixes = tuple(parse(prefix, prefix=True) for prefix in prefixes)
        for scheme in dict.fromkeys(prefix.scheme for prefix in self.prefixes):
            if importlib.util.find_spec(SCHEMES[scheme]) is None:
                extra = f"; install lorry[{EXTRAS[scheme]}]" if scheme in EXTRAS else ""
                raise _refused(f"{scheme}:// needs the package {SCHEMES[scheme]}{extra}")

    def check(self, text: str) -> Source:
        """The source that a client names. Raises PathRefused for a wrong form and for what no prefix allows."""
        source = parse(text)
        if not any(source.below(prefix) for prefix in self.prefixes):
            raise _refused(f"no --adapter-source of this server allows {str(source)[:200]}")
        return source
