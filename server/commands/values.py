"""Values as people write them on a command line: sizes, adapters with weights, biased tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import typer

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def size(text: str) -> int:
    """Bytes of `512MiB`, `1.5 GB`, `4096`; raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no size; write bytes or a number with KiB, MiB, GiB, KB, MB, GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def size_text(value: int) -> str:
    """The shortest way to write so many bytes: `512MiB`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value and value % _UNITS[unit.lower()] == 0:
            return f"{value // _UNITS[unit.lower()]}{unit}"
    return str(value)


def adapter(text: str) -> tuple[str, float | None]:
    """Id and weight of `pirate` or `pirate=0.5`; raises typer.BadParameter."""
    id, separator, weight = text.partition("=")
    try:
        return id, float(weight) if separator else None
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no adapter; write ID or ID=WEIGHT") from None


def biased_token(text: str) -> tuple[int, float]:
    """Token id and bias of `42=-3.5`; raises typer.BadParameter."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no bias; write TOKEN_ID=BIAS") from None


Number = TypeVar("Number", int, float)


def numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    """Numbers of `5,0.1`; raises typer.BadParameter, which names the option."""
    try:
        return [kind(piece) for piece in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} does not fit {option}: numbers separated by commas") from None


def token_ids(text: str, argument: str) -> list[int]:
    """Token ids of `5, 17 201`; raises typer.BadParameter, which names the argument."""
    try:
        found = [int(piece) for piece in text.replace(",", " ").split()]
    except ValueError:
        found = [-1]
    if not all(0 <= token < 1 << 32 for token in found):
        raise typer.BadParameter("--token-ids takes numbers from 0 on", param_hint=argument)
    return found


def file_or_text(text: str) -> str:
    """What the file of this name holds, or the text itself where there is none."""
    path = Path(text)
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else text
    except OSError:  # too long for a name
        return text
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{text} is no text in UTF-8") from None
