"""silu_mul on a GPU or in the interpreter; with LoRA it is tested in test_lora.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.kernels.silu_mul import silu_mul_reference
from lorry.kernels.triton.silu_mul import silu_mul

Measure = Callable[[Tensor, Tensor], float]
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # what the GPU does there in silence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "half"), [(0, 16), (1, 1536), (9, 37), (33, 16), (3, 1031)])
def test_silu_mul(rows: int, half: int, dtype: torch.dtype, device: str, relative_rms: Measure) -> None:
    gate_up = (torch.randn(rows, 2 * half + 11, device=device) * 8).to(dtype)[:, : 2 * half]
    if rows:
        gate_up[0, :5] = torch.tensor([-200.0, 200.0, 0.0, -88.0, 89.0])
    y = silu_mul(gate_up)
    assert y.shape == (rows, half)
    assert y.dtype is dtype
    if not rows:
        return
    assert y.isfinite().all()
    if dtype is torch.float32:
        assert relative_rms(y, silu_mul_reference(gate_up.double())) < 1e-6
    else:
        assert (y != silu_mul_reference(gate_up)).float().mean() < 1e-3
    assert torch.equal(silu_mul(gate_up[-1:])[0], y[-1])


@pytest.mark.parametrize("architecture", [80, 90])
def test_assembly(assembled: Callable[[str, int], list[Any]], architecture: int) -> None:
    (kernel,) = assembled("silu_mul", architecture)
    assert kernel.spills == 0
    assert kernel.count("LDG") == kernel.count("LDG.E.128") == 2
    assert kernel.count("STG") == kernel.count("STG.E.128") == 1
