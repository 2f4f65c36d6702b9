"""A wheel built from the sdist is whole and runs elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import lorry

ROOT = Path(__file__).parents[2]
FOLDERS = {"server": "server", "kernels": "kernels", "adapters": "adapters", "v1": "protos/lorry/v1"}
PACKAGED = {".py", ".pyi", ".proto", ".c", ".h"}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the variables that lead Python elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist of a copy of this checkout."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=folder / "checkout")
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    expected = {"lorry/__init__.py", "lorry/py.typed"}
    for name, folder in FOLDERS.items():
        expected |= {
            f"lorry/{name}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.suffix in PACKAGED
        }
    held = set(zipfile.ZipFile(wheel).namelist())
    assert expected - held == set()
    licences = {Path(name).name for name in held if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}
    strangers = {name for name in held - expected if ".dist-info/" not in name}
    assert {name for name in strangers if Path(name).suffix in PACKAGED or "__pycache__" in name} == set()


def test_lorry_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of the running environment, reached by a path file; ours is the installed wheel."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=elsewhere)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip())
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(theirs)))

    where = run(python, "-c", "import lorry.server.errors as e; print(e.__file__)", cwd=elsewhere).strip()
    assert Path(where).is_relative_to(environment)
    assert lorry.__version__ in run(environment / "bin" / "lorry", "--version", cwd=elsewhere)
