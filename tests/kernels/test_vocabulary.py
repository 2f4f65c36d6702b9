"""Reductions along the vocabulary against float64, on every set of lanes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorry.kernels import vocabulary

SIZES = (1, 15, 16, 17, 127, 128, 129, 211, 8209, 49_152)
pytestmark = pytest.mark.usefixtures("kernels")


def rows_of(size: int, rows: int = 7) -> Tensor:
    """Logits of several widths; the second row has a few finite ones, the last row one."""
    logits = torch.randn(rows, size) * torch.linspace(0.1, 8, rows)[:, None] + torch.linspace(-50, 50, rows)[:, None]
    logits[1, torch.rand(size) < 0.9] = -torch.inf
    logits[1, size // 2] = 1.5
    logits[-1] = -torch.inf
    logits[-1, size // 3] = -4.0
    return logits


def temperatures_of(rows: int) -> np.ndarray:
    found = np.linspace(0.2, 3.0, rows, dtype=np.float32)
    found[2] = 1.0
    return found


def weights_of(logits: Tensor, temperatures: np.ndarray) -> np.ndarray:
    z = logits.double().numpy()
    return np.exp((z - z.max(1, keepdims=True)) / temperatures.astype(np.float64)[:, None])


@pytest.mark.parametrize("size", SIZES)
def test_totals(size: int) -> None:
    logits, temperatures = rows_of(size), temperatures_of(7)
    weights = weights_of(logits, temperatures)
    np.testing.assert_allclose(vocabulary.totals(logits, temperatures), weights.sum(1), rtol=3e-6)


@pytest.mark.parametrize("size", SIZES)
def test_draws_invert_the_cumulative_distribution(size: int) -> None:
    logits, temperatures = rows_of(size).repeat(40, 1), np.tile(temperatures_of(7), 40)
    uniforms = np.random.default_rng(3).random(280)
    uniforms[:14], uniforms[14:28] = 0.0, 1.0 - 2.0**-53
    tokens = vocabulary.draw(logits, temperatures, uniforms)
    weights = weights_of(logits, temperatures)
    above = np.cumsum(weights, 1) / weights.sum(1, keepdims=True)
    rows = np.arange(280)
    assert (weights[rows, tokens] > 1e-38).all(), "what is impossible was drawn"
    assert (uniforms <= above[rows, tokens] + 1e-5).all()
    assert (uniforms >= np.where(tokens > 0, above[rows, tokens - 1], 0.0) - 1e-5).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_nth_that_is_equal(size: int) -> None:
    logits = torch.randint(0, 3, (9, size)).float()
    values, nth, expected = [], [], []
    for row in logits:
        places = (row == row[size // 2]).nonzero().flatten().tolist()
        values.append(float(row[size // 2]))
        nth.append(len(places) - 1 if len(nth) % 2 else len(places) // 2)
        expected.append(places[nth[-1]])
    found = vocabulary.nth_equal(logits, np.array(values, np.float32), np.array(nth))
    assert found.tolist() == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 7, 128, 2048, 60_000])
def test_the_largest(size: int, count: int) -> None:
    """Also where many are equal, and where the largest stand together."""
    logits = rows_of(size)
    logits[3] = torch.randint(0, 3, (size,)).float()
    logits[4] = torch.arange(size)
    logits[5] = -torch.arange(size)
    expected = logits.sort(dim=1, descending=True).values[:, :count]
    assert np.array_equal(vocabulary.top_values(logits, count), expected.numpy())


def test_a_row_depends_on_no_other() -> None:
    logits, temperatures, uniforms = rows_of(8209), temperatures_of(7), np.linspace(0, 0.99, 7)
    masses = vocabulary.totals(logits, temperatures)
    tokens = vocabulary.draw(logits, temperatures, uniforms)
    for row in range(7):
        one = logits[row : row + 1].contiguous()
        at = slice(row, row + 1)
        assert vocabulary.totals(one, temperatures[at])[0] == masses[row]
        assert vocabulary.draw(one, temperatures[at], uniforms[at])[0] == tokens[row]
