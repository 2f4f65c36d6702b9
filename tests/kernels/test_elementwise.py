from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorry.kernels.kv_store import CACHE_DTYPES, FP8, as_bits, empty_caches, kv_store, kv_store_reference
from lorry.kernels.rms_norm import rms_norm, rms_norm_reference
from lorry.kernels.rope import rope, rope_reference
from lorry.kernels.silu_mul import silu_mul, silu_mul_reference

Measure = Callable[[Tensor, Tensor], float]
pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize(("rows", "width"), [(1, 576), (7, 577), (3, 15), (131, 1000)])
def test_rms_norm(rows: int, width: int, relative_rms: Measure) -> None:
    x, weight = torch.randn(rows, width) * 3, torch.randn(width)
    y = rms_norm(x, weight, 1e-5)
    assert relative_rms(y, rms_norm_reference(x.double(), weight.double(), 1e-5)) < 1e-6
    assert torch.equal(rms_norm(x[-1:], weight, 1e-5)[0], y[-1])
    residual = torch.randn(rows, width)
    expected = residual + x
    y, updated = rms_norm(x, weight, 1e-5, residual)
    assert updated is residual
    assert torch.equal(residual, expected)
    assert relative_rms(y, rms_norm_reference(expected, weight, 1e-5)) < 1e-6


def test_rms_norm_of_heads_inside_a_fused_output(relative_rms: Measure) -> None:
    qkv, weight = torch.randn(11, 9 * 24), torch.randn(24)
    heads = qkv[:, 48:168].view(11, 5, 24)
    y = rms_norm(heads, weight, 1e-6)
    assert y.is_contiguous()
    assert relative_rms(y, rms_norm_reference(heads, weight, 1e-6)) < 1e-6


def test_rms_norm_in_bfloat16_rounds_like_the_reference() -> None:
    x, weight = torch.randn(5, 63).bfloat16(), torch.randn(63).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("width", [16, 36, 64, 128])
def test_rope_rotates_views_in_place(width: int, relative_rms: Measure) -> None:
    fused = torch.randn(13, 9 * width)
    q, k = fused[:, : 5 * width].view(13, 5, width), fused[:, 5 * width : 7 * width].view(13, 2, width)
    rest = fused[:, 7 * width :].clone()
    table = torch.randn(97, width)
    positions = torch.randint(0, 97, (13,))
    expected_q, expected_k = rope_reference(q, positions, table), rope_reference(k, positions, table)
    rope(q, k, positions, table)
    assert relative_rms(q, expected_q) < 1e-6
    assert relative_rms(k, expected_k) < 1e-6
    assert torch.equal(fused[:, 7 * width :], rest)
    with pytest.raises(IndexError, match=r"positions must lie in 0\.\.96"):
        rope(q, k, positions.fill_(97), table)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("width", [36, 64])
def test_kv_store_rounds_and_skips(dtype: torch.dtype, width: int) -> None:
    fused = torch.randn(19, 7 * width)
    k, v = fused[:, width : 4 * width].view(19, 3, width), fused[:, 4 * width :].view(19, 3, width)
    fused[0, width] = 1e-6  # below float16's normal range
    fused[1, width] = 7e4  # above its largest
    fused[2, width] = float("nan")
    fused[3, width], fused[4, width] = float("-inf"), 460.0  # e4m3 ends at 448
    caches = [cache.fill_(7.0) for _ in range(2) for cache in empty_caches(5, 3, 16, width, dtype)]
    slots = torch.randperm(80)[:19]
    slots[5] = -1
    kv_store(k, v, caches[0], caches[1], slots)
    kv_store_reference(k, v, caches[2], caches[3], slots)
    assert torch.equal(caches[0].float().nan_to_num(9.0), caches[2].float().nan_to_num(9.0))
    assert torch.equal(as_bits(caches[1]), as_bits(caches[3]))
    with pytest.raises(IndexError, match=r"-1\.\.79"):
        kv_store(k, v, caches[0], caches[1], slots.fill_(80))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
def test_conversions_round_like_torch_on_every_bit_pattern(dtype: torch.dtype) -> None:
    """Values on, just above and just below every number and every midpoint round as torch rounds."""
    kind = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    exact = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32).to(kind).view(dtype).float()
    nudged = [torch.nextafter(exact, torch.full_like(exact, side)) for side in (-9e9, 9e9)]
    middle = (exact + exact.roll(-1)) / 2
    values = torch.cat([exact, *nudged, middle, torch.nextafter(middle, torch.zeros_like(middle))])
    values = values[~values.isnan()]
    values = values[: values.numel() // 16 * 16].view(-1, 1, 16)
    rows = values.shape[0]
    caches = empty_caches(-(-rows // 16), 1, 16, 16, dtype)
    kv_store(values, values, *caches, torch.arange(rows))
    expected = (values.clamp(-448, 448) if dtype is FP8 else values).view(-1, 16).to(dtype)
    for cache in caches:
        assert torch.equal(cache.view(kind).reshape(-1, 16)[:rows], expected.view(kind))


@pytest.mark.parametrize(("rows", "half"), [(1, 1536), (9, 37), (33, 16)])
def test_silu_mul(rows: int, half: int, relative_rms: Measure) -> None:
    gate_up = torch.randn(rows, 2 * half) * 8
    gate_up[0, :5] = torch.tensor([-200.0, 200.0, 0.0, -88.0, 89.0])
    y = silu_mul(gate_up)
    assert y.isfinite().all()
    assert relative_rms(y, silu_mul_reference(gate_up.double())) < 1e-6
    assert torch.equal(silu_mul(gate_up[-1:])[0], y[-1])
