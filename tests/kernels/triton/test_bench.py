"""What bench/kernels.py does without a GPU: bounds, ratios, the table of goals, refusal, dry run."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.kernels import nf4

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


def start(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "kernels.py", *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_without_a_gpu_it_says_so() -> None:
    done = start()
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stdout


def test_a_dry_run_checks_and_writes(tmp_path: Path) -> None:
    output = tmp_path / "new" / "result.json"
    done = start("--dry-run", "--only", "silu", "--only", "penalties", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["failures"] == {}
    assert {figure["op"] for figure in result["figures"]} == {"silu_mul", "penalties"}
    assert all(figure["microseconds"] is None for figure in result["figures"])
    assert {goal["reached"] for goal in result["goals"]} == {"not yet measured"}
    assert set(result["versions"]) >= {"torch", "triton", "bitsandbytes"}


def test_a_wrong_answer_has_no_figures() -> None:
    measure, command = importlib.import_module("gpu.measure"), importlib.import_module("gpu.command")

    def half_wrong(stage: Any) -> Any:
        yield measure.Figure("op", "", 1, 1e-6, 8)
        measure.expect_close("op", torch.tensor([1.0, math.nan]), torch.ones(2), 0.1)

    def broken(stage: Any) -> Any:
        raise ImportError("no such kernel")

    def right(stage: Any) -> Any:
        measure.expect_close("op", torch.tensor([1.0, 1.001]), torch.ones(2), 0.1)
        yield measure.Figure("right", "", 1, 1e-6, 8)

    failures: dict[str, str] = {}
    stage = measure.Stage("cpu", dry=True)
    figures = command.run(stage, {"a": half_wrong, "b": broken, "c": right}, failures, dry=True)
    assert [figure.op for figure in figures] == ["right"]
    assert failures["a"].startswith("wrong: op") and "no such kernel" in failures["b"]
    assert command.default_output("kernels", "NVIDIA H100 80GB HBM3").name == "kernels-nvidia-h100-80gb-hbm3.json"


def test_ratios_and_bounds() -> None:
    measure, shapes = importlib.import_module("gpu.measure"), importlib.import_module("gpu.shapes")
    figure = measure.Figure("op", "", 4, 2e-6, 3e6, flops=4e9, peers={"peer": 5e-6, "absent": None})
    row = figure.report(measure.Limits(copy=3e12, cublas=8e14))
    assert row["of_copy"] == pytest.approx(0.5) and row["times_bytes_bound"] == pytest.approx(2)
    assert row["tflop_s"] == pytest.approx(2000) and row["of_cublas"] == pytest.approx(2.5)
    assert row["faster_than"] == {"peer": pytest.approx(2.5)}
    assert importlib.import_module("gpu.lora").lora_bytes(shapes.LLAMA, 1) == pytest.approx(2.62e6, rel=1e-3)
    assert shapes.LLAMA.linears["gate_up"] == ((14336, 14336), 4096)


def test_parts_of_one_weight_are_its_rows() -> None:
    linear, shapes = importlib.import_module("gpu.linear"), importlib.import_module("gpu.shapes")
    sizes, k = shapes.TINY.linears["qkv"]
    whole = nf4.quantize(torch.randn(sum(sizes), k))
    rows = torch.cat([nf4.dequantize(part) for part in linear.split(whole, sizes)])
    assert torch.equal(rows, nf4.dequantize(whole))


def nf4_row(name: str, rows: int, **values: Any) -> dict[str, Any]:
    return {"op": "nf4_linear", "shape": f"{name} 1x1", "rows": rows, **values}


def test_goals_are_read_from_the_worst_of_their_figures() -> None:
    goals = importlib.import_module("gpu.goals")
    assert [goal["shown"] for goal in goals.evaluate([])] == ["not yet measured"] * 5

    rows = [
        nf4_row(name, m, of_copy=0.9 if m != 8 else 0.7, faster_than={"bf16 F.linear": 0.9, "bitsandbytes gemv": 1.5})
        for name in ("qkv", "o", "gate_up", "down")
        for m in (1, 2, 4, 8, 16, 32, 64, 4096)
    ]
    lora = {"op": "lora in a layer", "shape": "8 adapters of rank 16"}
    rows += [lora | {"rows": m, "times_bytes_bound": 1.2 + m / 64} for m in (16, 64)]
    rows += [{"op": "attention decode", "shape": "16 sequences of 4096", "rows": 16, "of_copy": 0.81}]
    found = goals.evaluate(rows)
    assert [goal["measured"] for goal in found] == pytest.approx([0.7, 1.5, 1 / 0.9, 2.2, 0.81])
    assert [goal["reached"] for goal in found] == ["floor", "floor", "floor", "below the floor", "aim"]
    assert goals.evaluate(rows[1:])[2]["reached"] == "floor"
    without = [row for row in rows if (row["shape"], row["rows"]) != ("down 1x1", 2)]
    assert [goal["reached"] for goal in goals.evaluate(without)][:2] == ["not yet measured"] * 2
    level = [row | {"faster_than": {"bitsandbytes gemv": 1.0}} for row in rows]
    assert goals.evaluate(level)[1]["reached"] == "below the floor"
