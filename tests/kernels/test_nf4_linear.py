from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from lorry.kernels import nf4
from lorry.kernels.nf4_linear import (
    NF4Linear,
    Products,
    int16_codes,
    nf4_linear,
    nf4_linear_reference,
)

Measure = Callable[[Tensor, Tensor], float]
pytestmark = pytest.mark.usefixtures("kernels")
both = pytest.mark.parametrize("products", ["float32", "int16"])
TOLERANCE = {"float32": 1e-6, "int16": 1.2e-4}


def weights(sizes: tuple[int, ...], k: int, double_quant: bool = True) -> list[nf4.NF4Weight]:
    return [nf4.quantize(torch.randn(n, k), 64, double_quant) for n in sizes]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("sizes", "k"), [((176, 48, 16), 320), ((112,), 64), ((16, 80), 1600)])
def test_parts_come_back_bit_for_bit(sizes: tuple[int, ...], k: int, double_quant: bool) -> None:
    parts = weights(sizes, k, double_quant)
    linear = NF4Linear(parts)
    assert linear.native
    assert (linear.N, linear.in_features, linear.out_features) == (list(sizes), k, sum(sizes))
    for before, after in zip(parts, linear.parts, strict=True):
        for field in fields(nf4.NF4Weight):
            a, b = getattr(before, field.name), getattr(after, field.name)
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


@both
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_row_count_equals_the_reference_and_its_solo_row(
    double_quant: bool, bias: bool, products: Products, relative_rms: Measure
) -> None:
    parts = weights((176, 48, 16), 320, double_quant)
    offset = torch.randn(240) if bias else None
    linear = NF4Linear(parts, offset, products)
    x = torch.randn(70, 320)
    expected = nf4_linear_reference(x, parts, offset)
    solo = torch.cat([nf4_linear(x[i : i + 1], linear) for i in range(70)])
    assert relative_rms(solo, expected) < TOLERANCE[products]
    for rows in (*range(1, 27), 47, 48, 49, 70):
        assert torch.equal(nf4_linear(x[:rows], linear), solo[:rows]), rows


@both
def test_more_rows_than_one_superblock(products: Products, relative_rms: Measure) -> None:
    parts = weights((80,), 128)
    linear = NF4Linear(parts, products=products)
    x = torch.randn(1037, 128)
    y = nf4_linear(x, linear)
    assert relative_rms(y, nf4_linear_reference(x, parts)) < TOLERANCE[products]
    assert torch.equal(nf4_linear(x[1030:1031], linear)[0], y[1030])


@both
@pytest.mark.parametrize("k", [1088, 15296, 30720])
def test_nested_groups_cross_inside_a_tile(k: int, products: Products, relative_rms: Measure) -> None:
    parts = weights((48,), k)
    assert parts[0].nested_absmax is not None
    linear = NF4Linear(parts, products=products)
    x = torch.randn(3, k)
    y = nf4_linear(x, linear)
    assert relative_rms(y, nf4_linear_reference(x, parts)) < TOLERANCE[products]
    assert torch.equal(nf4_linear(x[2:], linear)[0], y[2])


@both
def test_strided_rows_and_out(products: Products, relative_rms: Measure) -> None:
    parts = weights((48, 16), 192)
    linear = NF4Linear(parts, products=products)
    wide = torch.randn(9, 250)
    x = wide[:, 7:199]
    target = torch.full((9, 100), float("nan"))
    out = target[:, 20:84]
    assert nf4_linear(x, linear, out) is out
    assert relative_rms(out, nf4_linear_reference(x, parts)) < TOLERANCE[products]
    assert target[:, :20].isnan().all()
    assert target[:, 84:].isnan().all()
    with pytest.raises(ValueError, match="out must be"):
        nf4_linear(x, linear, target)
    with pytest.raises(ValueError, match=r"x must be \[M, 192\]"):
        nf4_linear(wide, linear)


def test_int16_products_equal_the_same_integers_in_torch() -> None:
    """The rounding of x and of the codes is the only difference from exact products: what is summed is exact."""
    parts = weights((48,), 192)
    linear = NF4Linear(parts, products="int16")
    codes, unit = int16_codes(tuple(parts[0].code.tolist()))
    assert codes.tolist() == 2 * (parts[0].code.double() * unit).round().int().tolist()
    x = torch.randn(5, 192)
    x[1] *= torch.randn(192).exp() ** 4  # outliers
    x[2] = 1e-3
    x[3, :64] = 0
    blocks = x.view(5, 3, 64)
    step = blocks.abs().sum(-1, keepdim=True) / (2147483647 / unit - 48)
    step = torch.maximum(step, blocks.abs().amax(-1, keepdim=True) / 32767) + 1e-35
    rounded = (blocks * (1 / step)).round()
    assert rounded.abs().sum(-1).max() * codes.abs().max() < 2**31
    rounded_weight = nf4.dequantize(replace(parts[0], code=codes[:16] / unit), torch.float32)
    expected = torch.nn.functional.linear((rounded * step).view(5, 192).double(), rounded_weight.double())
    error = (nf4_linear(x, linear).double() - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() < 2e-5, error  # a rounding to the other side in a hundred thousand is allowed


def test_int16_sums_never_leave_32_bits(relative_rms: Measure) -> None:
    """Codes of one sign against x of one sign, and one huge element in a block: the worst that a block can hold."""
    for absmax in (torch.ones(16, 128), -torch.ones(16, 128)):
        part = nf4.quantize(absmax, 64, False)
        linear = NF4Linear([part], products="int16")
        x = torch.ones(4, 128)
        x[1] *= -3e8
        x[2, 5], x[2, 70:] = 1e30, 1e-30
        x[3] *= 1e-38
        y = nf4_linear(x, linear)
        assert relative_rms(y[:3], nf4_linear_reference(x[:3], [part])) < 1e-4
        assert y[3].abs().max() < 1e-34


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int16_products_hide_no_bad_number(bad: float) -> None:
    linear = NF4Linear(weights((32,), 192), products="int16")
    for rows in (1, 5, 20):
        x = torch.randn(rows, 192)
        clean = nf4_linear(x, linear)
        x[rows - 1, 100] = bad
        y = nf4_linear(x, linear)
        assert not y[rows - 1].isfinite().any()
        assert torch.equal(y[: rows - 1], clean[: rows - 1])


@both
def test_determinism(products: Products) -> None:
    linear = NF4Linear(weights((208, 64), 576), products=products)
    for rows in (1, 13):
        x = torch.randn(rows, 576)
        first = nf4_linear(x, linear)
        assert all(torch.equal(nf4_linear(x, linear), first) for _ in range(20))


@pytest.mark.parametrize(("n", "k"), [(17, 128), (32, 96), (33, 65)])
def test_other_shapes_take_the_reference(n: int, k: int) -> None:
    parts = weights((n,), k)
    linear = NF4Linear(parts)
    assert not linear.native
    x = torch.randn(3, k)
    assert torch.equal(nf4_linear(x, linear), nf4_linear_reference(x, parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_take_the_reference(dtype: torch.dtype) -> None:
    parts = weights((48,), 128)
    x = torch.randn(5, 128, dtype=dtype)
    y = nf4_linear(x, NF4Linear(parts))
    assert y.dtype == dtype
    assert torch.equal(y, nf4_linear_reference(x, parts))


def test_memory_keeps_double_quantization() -> None:
    linear = NF4Linear(weights((4096,), 1024))
    assert linear.bits_per_weight < 4.13
