"""How `compare.py` talks to a peer: a process in an environment of its own, one JSON object a line each way.

    argv[1]  settings: {"base": folder, "adapters": folder, "adapter_names": [...], …the peer's own}
    peer  → {"versions": {...}}
    stdin ← {"prompts": [[ids]], "adapters": [name or null], "streams": n, "new_tokens": m}
    peer  → {"seconds": s, "outputs": [[ids]]}

A worker is built once and answers until its input ends. Whatever libraries print goes to stderr. Only the standard
library is imported here: the peer's environment has none of ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

TokenIds = list[list[int]]  # of each prompt, or of each answer


class Worker(Protocol):
    """A system that generates greedily, ignoring end-of-sequence."""

    def generate(
        self, prompts: list[list[int]], adapters: list[str | None], streams: int, new_tokens: int
    ) -> list[list[int]]:
        """Run all prompts, at most `streams` at once; the new tokens of each."""


def serve(build: Callable[[dict[str, Any]], Worker], packages: Sequence[str]) -> None:
    """Answer work on stdin until it ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    worker = build(settings)
    versions = {package: importlib.metadata.version(package) for package in packages}
    replies.write(json.dumps({"versions": versions}) + "\n")
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        outputs = worker.generate(work["prompts"], work["adapters"], work["streams"], work["new_tokens"])
        replies.write(json.dumps({"seconds": time.perf_counter() - start, "outputs": outputs}) + "\n")
