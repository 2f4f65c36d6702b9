from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from lorry.kernels import nf4
from lorry.kernels.nf4_linear import NF4Linear, nf4_linear, nf4_linear_reference

Measure = Callable[[Tensor, Tensor], float]
pytestmark = pytest.mark.usefixtures("kernels")


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


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_row_count_equals_the_reference_and_its_solo_row(
    double_quant: bool, bias: bool, relative_rms: Measure
) -> None:
    parts = weights((176, 48, 16), 320, double_quant)
    offset = torch.randn(240) if bias else None
    linear = NF4Linear(parts, offset)
    x = torch.randn(70, 320)
    expected = nf4_linear_reference(x, parts, offset)
    solo = torch.cat([nf4_linear(x[i : i + 1], linear) for i in range(70)])
    assert relative_rms(solo, expected) < 1e-6
    for rows in range(1, 71):
        assert torch.equal(nf4_linear(x[:rows], linear), solo[:rows]), rows


def test_more_rows_than_one_superblock(relative_rms: Measure) -> None:
    parts = weights((80,), 128)
    x = torch.randn(1037, 128)
    y = nf4_linear(x, NF4Linear(parts))
    assert relative_rms(y, nf4_linear_reference(x, parts)) < 1e-6
    assert torch.equal(nf4_linear(x[1030:1031], NF4Linear(parts))[0], y[1030])


@pytest.mark.parametrize("k", [1088, 15296, 30720])
def test_nested_groups_cross_inside_a_tile(k: int, relative_rms: Measure) -> None:
    parts = weights((48,), k)
    assert parts[0].nested_absmax is not None
    x = torch.randn(3, k)
    y = nf4_linear(x, NF4Linear(parts))
    assert relative_rms(y, nf4_linear_reference(x, parts)) < 1e-6
    assert torch.equal(nf4_linear(x[2:], NF4Linear(parts))[0], y[2])


def test_strided_rows_and_out(relative_rms: Measure) -> None:
    parts = weights((48, 16), 192)
    linear = NF4Linear(parts)
    wide = torch.randn(9, 250)
    x = wide[:, 7:199]
    target = torch.full((9, 100), float("nan"))
    out = target[:, 20:84]
    assert nf4_linear(x, linear, out) is out
    assert relative_rms(out, nf4_linear_reference(x, parts)) < 1e-6
    assert target[:, :20].isnan().all()
    assert target[:, 84:].isnan().all()
    with pytest.raises(ValueError, match="out must be"):
        nf4_linear(x, linear, target)
    with pytest.raises(ValueError, match=r"x must be \[M, 192\]"):
        nf4_linear(wide, linear)


def test_determinism() -> None:
    linear = NF4Linear(weights((208, 64), 576))
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
