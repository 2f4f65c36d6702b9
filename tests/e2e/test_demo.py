"""`lorry demo` as a newcomer runs it: the default model, the example adapters, exit code 0."""

from __future__ import annotations

import re
import subprocess
import sys


def test_demo_shows_four_answers_of_one_batch() -> None:
    command = [sys.executable, "-m", "lorry.server.cli", "demo", "--max-new-tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    titles = re.findall(r"^\[(\w+)\] \S.* \(\d+ tokens\)$", done.stdout, re.MULTILINE)
    assert titles == ["base", "json", "pirate", "sentiment"]
    assert "in one batch: GetLoad said 4 sequences running" in done.stdout
    assert re.search(r"\d+ tokens/s together", done.stdout)
