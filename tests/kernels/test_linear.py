from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorry.kernels.linear import DenseLinear, dense_linear, dense_linear_reference, embed

Measure = Callable[[Tensor, Tensor], float]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(113, 95), (208, 320), (7, 577)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference_and_its_solo_row(
    n: int, k: int, dtype: torch.dtype, bias: bool, relative_rms: Measure
) -> None:
    weight = torch.randn(n, k).to(dtype)
    offset = torch.randn(n) if bias else None
    linear = DenseLinear(weight, offset)
    assert torch.equal(linear.weight, weight)
    x = torch.randn(29, k)
    solo = torch.cat([dense_linear(x[i : i + 1], linear) for i in range(29)])
    assert relative_rms(solo, dense_linear_reference(x, weight, offset)) < 1e-6
    for rows in (2, 3, 5, 7, 11, 12, 13, 23, 29):
        assert torch.equal(dense_linear(x[:rows], linear), solo[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_head_share_one_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(113, 95).to(dtype)
    linear = DenseLinear(weight)
    ids = torch.tensor([0, 112, 17, 17, 63])
    assert torch.equal(linear.row(ids), weight[ids])
    assert torch.equal(embed(ids, linear, torch.float32), weight[ids].float())
    assert linear.nbytes == weight.numel() * weight.element_size()
    with pytest.raises(IndexError, match="below 113"):
        linear.row(torch.tensor([113]))


def test_sixteen_bit_rows_are_accumulated_in_float32(relative_rms: Measure) -> None:
    weight = torch.randn(48, 1024).bfloat16()
    x = torch.randn(5, 1024).bfloat16()
    y = dense_linear(x, DenseLinear(weight))
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, x.double() @ weight.double().T) < 3e-3
