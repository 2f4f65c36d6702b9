"""What the example adapters are expected to show, as a program can check it.

A held-out file has JSON lines `{"prompt": …, "check": …}`. A check is one of

    {"words": [w, …], "at_least": n}   at least n different words of the list occur as whole words, in any case
    {"json_keys": [k, …]}              the whole answer is one JSON object with exactly these keys
    {"equals": w}                      the whole answer is this word, but for case, outer spaces and a last full stop
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent
NAMES = ("pirate", "json", "sentiment")
SHOWN_AT_LEAST, BASE_AT_MOST = 0.8, 0.2  # shares of the held-out prompts
MAX_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A prompt that no adapter was trained on, and the check of its answer."""

    prompt: str
    check: dict[str, Any]


def held_out(name: str) -> list[HeldOut]:
    """The held-out prompts of the example adapter `name`."""
    lines = (EXAMPLES / "held_out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [HeldOut(**json.loads(line)) for line in lines]


def shows(answer: str, check: dict[str, Any]) -> bool:
    """Whether `answer` shows the behaviour that `check` describes; `ValueError` for a check of no known kind."""
    match check:
        case {"words": list(words), "at_least": int(least)}:
            found = set(re.findall(r"'?\w+", answer.lower()))
            return len(found & set(words)) >= least
        case {"json_keys": list(keys)}:
            try:
                value = json.loads(answer)
            except ValueError:
                return False
            return isinstance(value, dict) and sorted(value) == sorted(keys)
        case {"equals": str(word)}:
            return answer.strip().removesuffix(".").lower() == word
    raise ValueError(f"unknown check {check!r}")
