"""Pages in 8 bits: what their codes and scales hold, and what they cost."""

from __future__ import annotations

import pytest
import torch
from random_adapters import LAYOUT
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear, canonicalise, to_pages
from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.layout import Linear
from lorry.adapters.reading.checkpoint import LinearTensors
from lorry.adapters.reading.rounding import rounding
from lorry.adapters.reading.spec import AdapterSpec
from lorry.kernels.lora import BYTES, page_parts

TYPES = list(BYTES)
STEPS = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}
"""What a number is off by at most, of the largest of its row; in e4m3 of itself, above 2**-6 / 448 of the largest."""


def update(pages: Tensor, in_features: int) -> Tensor:
    """sum of A.T @ B over the pages, float64 [K, N]."""
    total = torch.zeros((), dtype=torch.float64)
    for page in pages:
        a, b, scales = page_parts(page, in_features, (len(page) - 64) // 16 - in_features)
        total = total + (a.double() * scales.double()[:, None]).T @ b.double()
    return total


def of(pages: Tensor, linear: Linear, scaling: float = 0.7) -> CanonicalAdapter:
    return CanonicalAdapter({linear: CanonicalLinear(pages, scaling)}, 16, ("q_proj",), ("lora",), "0" * 64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [1, 15, 16, 33])
def test_every_product_of_a_rank_is_within_a_step(dtype: torch.dtype, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 37, generator=generator), torch.randn(29, rank, generator=generator)
    a[rank // 2] *= 1e-18  # rows of one matrix have nothing in common
    step = STEPS[dtype]
    for number in range(rank):
        alone = to_pages(a[number : number + 1], b[:, number : number + 1], dtype)
        exact = a[number].double()[:, None] * b[:, number].double()
        bound = exact.abs().max() * (2 * step + step**2) * 1.001
        assert (update(alone, 37) - exact).abs().max() <= bound
    pages = to_pages(a, b, dtype)
    separate = sum(update(to_pages(a[n : n + 1], b[:, n : n + 1], dtype), 37) for n in range(rank))
    padding = pages[-1, 64 + 37 * 16 :].view(torch.uint8).view(16, 29)[rank % 16 or 16 :]
    assert padding.shape[0] == -rank % 16 and not padding.any()
    torch.testing.assert_close(update(pages, 37), separate, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_denormals_and_the_largest(dtype: torch.dtype) -> None:
    """A rank of zeros adds nothing; the largest of a row is exact; numbers that float32 barely holds have a scale."""
    a, b = torch.ones(5, 8), torch.ones(6, 5)
    a[0] = 0
    b[:, 1] = 0
    a[2], b[:, 2] = 1e-44, 3e38
    a[3], b[:, 3] = 3e38, 1e-42
    codes_a, codes_b, scales = page_parts(to_pages(a, b, dtype)[0], 8, 6)
    top = BYTES[dtype]
    assert scales[:2].tolist() == [0, 0] and not scales[5:].any()
    assert not codes_a[0].float().any() and not codes_b[1].float().any()
    for rank in (2, 3, 4):
        assert codes_a[rank].float().eq(top).all() and codes_b[rank].float().eq(top).all()
        expected = a[rank, 0].double() * b[0, rank].double() / top**2
        assert float(scales[rank]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", ["product", "infinite"])
def test_scales_that_float32_cannot_hold_are_refused(dtype: torch.dtype, bad: str) -> None:
    shape = LAYOUT.shape("q_proj")
    a, b = torch.ones(2, shape[0]), torch.ones(shape[1], 2)
    a[1], b[:, 1] = (3e38, 3e38) if bad == "product" else (torch.inf, 1.0)
    tensors = {(1, "q_proj"): LinearTensors(shape[0], a=a, b=b)}
    spec = AdapterSpec.from_bytes(b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}')
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(MalformedAdapter, match=f"too large for the pool's {name}"):
        canonicalise(tensors, spec, LAYOUT, None, dtype, "0" * 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_reported_cost_is_that_of_the_products(dtype: torch.dtype) -> None:
    k, n = LAYOUT.shape("q_proj")
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(9, k, generator=generator), torch.randn(n, 9, generator=generator)
    exact, pages = a.double().T @ b.double().T, to_pages(a, b, dtype)
    expected = float((update(pages, k) - exact).norm() / exact.norm())
    linear = (2, "q_proj")
    cost = rounding(of(to_pages(a, b, torch.float32), linear), of(pages, linear), LAYOUT)
    assert cost is not None and cost.worst_linear == LAYOUT.module_path(*linear)
    assert cost.error == pytest.approx(expected, rel=1e-6) and cost.worst == pytest.approx(expected, rel=1e-6)
    assert 1e-3 < cost.error < (2e-2 if dtype is torch.int8 else 8e-2)
    nothing = of(torch.empty(0, LAYOUT.page_elements("q_proj")), linear)
    assert rounding(nothing, nothing, LAYOUT) is None
