"""What bench/serve.py measures of bystanders, on a server of a tiny model with random weights and no tokenizer."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lorry.kernels import native

SERVE = Path(__file__).parents[2] / "bench" / "serve.py"


def test_bystanders_while_adapters_load(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(importlib.import_module("steps.sizes").TINY))
    native.library()
    (tmp_path / "lorry").mkdir()
    (tmp_path / "lorry" / "native").symlink_to(native.cache_folder())  # compiled once for all tests
    output = tmp_path / "new" / "result.json"
    command = ["--bystanders", "--model", model, "--streams", "3", "--new-tokens", "60", "--adapters", "2"]
    options = [f"--server-option={option}" for option in ("--load-format=dummy", "--threads=1", "--device=cpu")]
    done = subprocess.run(
        [sys.executable, SERVE, *command, *options, "--prompt-tokens", "8", "--output", output],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    found = result["bystanders"]
    assert found["loads"] > 0 and found["seconds"] > 0
    ((quiet, loading),) = found["rounds"]
    assert found["p99_more"] == pytest.approx(loading / quiet - 1) and found["gaps"] == 59
    assert (quiet, loading) == (found["quiet_ms"]["p99"], found["loading_ms"]["p99"])
    assert 0 < found["quiet_ms"]["p50"] <= found["quiet_ms"]["p99"]
    assert result["workload"]["requests"] == result["workload"]["streams"] == 3
    assert result["model"] == "tiny" and "torch" in result["machine"]["versions"]
    assert "while adapters load" in done.stdout


def test_bystanders_need_a_server_of_their_own() -> None:
    with pytest.raises(typer.BadParameter, match="needs a server of its own"):
        importlib.import_module("serve").main(target="127.0.0.1:1", bystanders=True)
