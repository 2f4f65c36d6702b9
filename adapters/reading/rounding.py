"""What pages in 8 bits cost an adapter: its updates as served less its updates as trained.

    error = ‖Âᵀ·B̂ − Aᵀ·B‖ / ‖Aᵀ·B‖     the relative RMS of x·Aᵀ·B over x of independent, equally distributed inputs

in Frobenius norms, which the ranks alone give: ‖Aᵀ·B‖² is the sum over all elements of (A·Aᵀ) ⊙ (B·Bᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear
from lorry.adapters.layout import Linear, ModelLayout
from lorry.kernels.lora import page_parts


@dataclass(frozen=True)
class Rounding:
    """The error of all linears together, that of the worst one, and its path."""

    error: float
    worst: float
    worst_linear: str


def rounding(exact: CanonicalAdapter, rounded: CanonicalAdapter, layout: ModelLayout) -> Rounding | None:
    """Of the same adapter in two dtypes of pages; None where it has no pages that are not zeros."""
    squares: dict[Linear, tuple[float, float]] = {}
    for linear, own in exact.linears.items():
        shape = layout.shape(linear[1])
        a, b = _ranks(own, *shape)
        other_a, other_b = _ranks(rounded.linears[linear], *shape)
        scale = own.scaling**2
        difference = _square(torch.cat([other_a, a]), torch.cat([other_b, -b]))
        squares[linear] = scale * difference, scale * _square(a, b)
    whole = sum(update for _, update in squares.values())
    if not whole:
        return None
    each = {linear: (error / update) ** 0.5 for linear, (error, update) in squares.items() if update}
    worst = max(each, key=lambda linear: each[linear])
    error = (sum(error for error, _ in squares.values()) / whole) ** 0.5
    return Rounding(error, each[worst], layout.module_path(*worst))


def _ranks(linear: CanonicalLinear, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A [R, K], by the scales of 8 bits, and B [R, N] of all pages, float64."""
    parts = [page_parts(page, in_features, out_features) for page in linear.pages]
    a = [a.double() * scales.double()[:, None] for a, _, scales in parts]
    nothing = torch.zeros(0, 1, dtype=torch.float64)
    return torch.cat(a or [nothing]), torch.cat([b.double() for _, b, _ in parts] or [nothing])


def _square(a: Tensor, b: Tensor) -> float:
    """‖Aᵀ·B‖², at least 0: what is left of large numbers may be below."""
    return max(0.0, float((a @ a.T * (b @ b.T)).sum()))
