"""Where the Triton kernels run in these tests: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
COMPILATION_SECONDS = 900  # of everything, beside whatever else the machine does


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """The first test of the assembly waits for all of it."""
    for item in items:
        if "assembled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(COMPILATION_SECONDS))


@pytest.fixture
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="session")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """(case, architecture) → the `assembly.Assembly` of each kernel that the case launches; see cases_*.py."""
    folder = tmp_path_factory.mktemp("assembly")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compiled(cases: Sequence[Path]) -> dict[str, Any]:
        output = folder / f"{cases[0].stem}.json"
        command = [sys.executable, HERE / "assembly.py", output, *(each.stem for each in cases)]
        subprocess.run(command, env=environment, check=True, timeout=COMPILATION_SECONDS)
        results: dict[str, Any] = json.loads(output.read_text())
        return results

    processes = os.cpu_count() or 1
    cases = sorted(HERE.glob("cases_*.py"))
    with ThreadPoolExecutor(processes) as pool:
        results = dict(ChainMap(*pool.map(compiled, filter(None, (cases[at::processes] for at in range(processes))))))
    spec = importlib.util.spec_from_file_location("assembly", HERE / "assembly.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["assembly"] = module
    spec.loader.exec_module(module)
    return lambda case, architecture: [module.Assembly(**record) for record in results[f"{case}@{architecture}"]]
