"""Importing any module of ours reads no environment variable: configuration is handed down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"

# Runs in a fresh interpreter: SRC in argv[1]. Prints one line for every read that a file below SRC/lorry caused,
# directly or through the standard library, while the modules there were imported.
PROBE = """
import importlib, os, pathlib, sys

src = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(src))
own = [str(src / "lorry")] + [str(p.resolve()) for p in (src / "lorry").iterdir() if p.is_dir()]
library = os.path.dirname(os.__file__)
reads = []


def record(key):
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        standard = file.startswith(library) and "site-packages" not in file
        if not standard and not file.startswith("<frozen"):
            if any(file.startswith(folder + os.sep) for folder in own):
                reads.append(f"{os.path.relpath(file, src)}:{frame.f_lineno} reads {key!r}")
            return
        frame = frame.f_back


class Watched(type(os.environ)):
    def __getitem__(self, key):
        record(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        record(key)
        return super().__contains__(key)

    def __iter__(self):
        record("*")
        return super().__iter__()


os.environ.__class__ = Watched

names = []
for folder, folders, files in os.walk(src / "lorry", followlinks=True):
    folders[:] = [f for f in folders if f.isidentifier() and f != "__pycache__"]
    package = ".".join(pathlib.Path(folder).relative_to(src).parts)
    names += [package if f == "__init__.py" else f"{package}.{f[:-3]}" for f in files if f.endswith(".py")]
for name in sorted(names):
    importlib.import_module(name)
print("imported", len(names))
print(*dict.fromkeys(reads), sep="\\n")
"""


def reads_at_import(src: Path) -> tuple[int, list[str]]:
    """How many modules `src/lorry` has, and which environment variables their import reads, with the place."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(src)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    first, *rest = [line for line in run.stdout.splitlines() if line]
    return int(first.removeprefix("imported ")), rest


def test_no_module_reads_the_environment_at_import() -> None:
    imported, reads = reads_at_import(SRC)
    assert imported > 20
    assert reads == []


def test_a_read_is_reported(tmp_path: Path) -> None:
    package = tmp_path / "lorry"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "clean.py").write_text("import os\n\ndef later():\n    return os.environ['HOME']\n")
    (package / "direct.py").write_text("import os\nA = os.environ.get('SOME_SETTING')\n")
    (package / "kernels" / "indirect.py").write_text("import os\nimport lorry.clean\nB = lorry.clean.later()\n")
    (package / "present.py").write_text("import os\nC = 'SOME_SETTING' in os.environ\nD = os.path.expanduser('~')\n")
    imported, reads = reads_at_import(tmp_path)
    assert imported == 5
    assert sorted(reads) == [
        "lorry/clean.py:4 reads 'HOME'",
        "lorry/direct.py:2 reads 'SOME_SETTING'",
        "lorry/present.py:2 reads 'SOME_SETTING'",
        "lorry/present.py:3 reads 'HOME'",
    ]
