"""What README.md quotes is what the repository holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_client_is_the_one_that_is_tested() -> None:
    client = (ROOT / "examples" / "client.py").read_text(encoding="utf-8")
    assert f"```python\n{client}```\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_that_of_the_options() -> None:
    command = [sys.executable, ROOT / "docs" / "settings.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
