"""Prompts for `speculation.py`: texts of this repository to be edited and summarised, and questions.

What is asked of a text is a fixed turn of four: a word replaced, spelling corrected, the main sentences picked, a
summary. The texts are the beginnings of files, the questions those that the example adapters are checked with; neither
was chosen by what came out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = (
    "README.md",
    "server/decoding/sampling.py",
    "docs/decoding.md",
    "tests/model/prose.txt",
    "CONTRIBUTING.md",
    "server/engine/scheduler.py",
    "docs/structured-output.md",
    "kernels/nf4.py",
    "docs/gpu.md",
    "server/cache/prefix.py",
    "docs/sources.md",
    "protos/lorry/v1/generation.proto",
    "docs/performance.md",
    "adapters/device/pool.py",
    "docs/decoding-search.md",
    "kernels/csrc/linear.c",
)
CHARACTERS = 600  # of a text, and what is left of its last line
TASKS = ("replace", "correct", "pick", "summarise")
_WORD = re.compile(r"[A-Za-z]{5,}")


@dataclass(frozen=True)
class Prompt:
    """A user's message, and what is asked in it."""

    task: str
    message: str


def edits() -> list[Prompt]:
    """One for each file, the tasks in turn."""
    prompts = []
    for number, name in enumerate(FILES):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        text = text[: text.index("\n", CHARACTERS)].strip()
        task = TASKS[number % len(TASKS)]
        prompts.append(Prompt(task, _message(task, text)))
    return prompts


def questions() -> list[Prompt]:
    """Held-out prompts of the example adapters, as many as there are edits."""
    lines = [
        line
        for path in sorted((REPOSITORY / "examples" / "held_out").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    asked = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))
    return [Prompt("chat", message) for message in asked[:: max(1, len(asked) // len(FILES))][: len(FILES)]]


def _message(task: str, text: str) -> str:
    match task:
        case "replace":
            ((word, _),) = Counter(_WORD.findall(text)).most_common(1)
            return f'Repeat the following text, but write "example" instead of "{word}".\n\n{text}'
        case "correct":
            return f"Correct the spelling mistakes in the following text and change nothing else.\n\n{misspelt(text)}"
        case "pick":
            return f"Which are the three most important sentences of the following text? Quote them.\n\n{text}"
        case _:
            return f"Summarise the following text.\n\n{text}"


def misspelt(text: str, every: int = 9) -> str:
    """Two letters in the middle of every so-many-th longer word change places."""
    words = list(_WORD.finditer(text))[every - 1 :: every]
    for word in reversed(words):
        at = (word.start() + word.end()) // 2
        text = text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]
    return text
