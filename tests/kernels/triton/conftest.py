"""Where the Triton kernels run in these tests: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
COMPILATION_SECONDS = 900  # of a module's cases, beside whatever else the machine does


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """The first of a module that looks at the assembly waits for all of its cases."""
    for item in items:
        if "assembled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(COMPILATION_SECONDS))


@pytest.fixture
def device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="module")
def assembled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], list[Any]]:
    """(case, architecture) → the `assembly.Assembly` of each kernel that the case launches, of the module's cases."""
    cases = request.path.stem.replace("test_", "cases_")
    if not (HERE / f"{cases}.py").exists():
        cases = "cases_elementwise"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = tmp_path_factory.mktemp("assembly") / f"{cases}.json"
    command = [sys.executable, HERE / "assembly.py", output, cases]
    subprocess.run(command, env=environment, check=True, timeout=COMPILATION_SECONDS)
    results: dict[str, Any] = json.loads(output.read_text())
    spec = importlib.util.spec_from_file_location("assembly", HERE / "assembly.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["assembly"] = module
    spec.loader.exec_module(module)
    return lambda case, architecture: [module.Assembly(**record) for record in results[f"{case}@{architecture}"]]
