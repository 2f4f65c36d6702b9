"""rms_norm on a GPU or in the interpreter; with LoRA it is tested in test_lora.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.kernels.rms_norm import rms_norm_reference
from lorry.kernels.triton.rms_norm import rms_norm

Measure = Callable[[Tensor, Tensor], float]
pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def agrees(y: Tensor, x: Tensor, weight: Tensor, eps: float, measure: Measure) -> None:
    """float32 against float64; 16 bits bit for bit but for normalized values next to a midpoint."""
    assert y.dtype is x.dtype
    if x.dtype is torch.float32:
        assert measure(y, rms_norm_reference(x.double(), weight.double(), eps)) < 1e-6
    else:
        assert (y != rms_norm_reference(x, weight, eps)).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (7, 577), (3, 15), (17, 1000), (2, 4104)])
def test_rows(rows: int, width: int, dtype: torch.dtype, device: str, relative_rms: Measure) -> None:
    wide = (torch.randn(rows, width + 9, device=device) * 3).to(dtype)
    x, weight = wide[:, :width], torch.randn(width, device=device).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.is_contiguous()
    agrees(y, x, weight, 1e-5, relative_rms)
    assert torch.equal(rms_norm(x[-1:], weight, 1e-5)[0], y[-1])
    residual = torch.randn(rows, width + 5, device=device).to(dtype)[:, :width]
    expected = residual + x
    y = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, expected)
    agrees(y, expected, weight, 1e-5, relative_rms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 128])
def test_heads_inside_a_fused_output(width: int, dtype: torch.dtype, device: str, relative_rms: Measure) -> None:
    qkv = torch.randn(11, 9 * width, device=device).to(dtype)
    heads, weight = qkv[:, 2 * width : 7 * width].view(11, 5, width), torch.randn(width, device=device).to(dtype)
    y = rms_norm(heads, weight, 1e-6)
    assert y.is_contiguous()
    agrees(y, heads, weight, 1e-6, relative_rms)


def test_no_rows_and_four_dimensions(device: str, relative_rms: Measure) -> None:
    weight = torch.randn(40, device=device)
    assert rms_norm(torch.empty(0, 40, device=device), weight, 1e-6).shape == (0, 40)
    x = torch.randn(2, 3, 5, 40, device=device)
    agrees(rms_norm(x, weight, 1e-6), x, weight, 1e-6, relative_rms)
    assert rms_norm(torch.zeros(3, 40, device=device), weight, 1e-6).abs().max() == 0


@pytest.mark.parametrize("architecture", [80, 90])
def test_assembly(assembled: Callable[[str, int], list[Any]], architecture: int) -> None:
    for case, loads in (("rms_norm", 4), ("rms_norm residual", 6)):
        (kernel,) = assembled(case, architecture)
        assert kernel.spills == 0
        assert kernel.count("LDG") == kernel.count("LDG.E.128") == loads
        assert kernel.count("STG") == kernel.count("STG.E.128") > 0
    (kernel,) = assembled("rms_norm heads", architecture)
    assert kernel.spills == 0
    assert kernel.count("LDG.E.128") == kernel.count("STG.E.128") == 1
