"""What is left of a row's distribution, as a window over its vocabulary in falling order.

    w[i] = exp((z[i] - max z) / T)      p[i] = w[i] / M       M = Σ w over what is left
    H    = -Σ p log p = log M - E / M                         E = Σ w log w over what is left

Every cut keeps all tokens between a smallest and a largest logit, and tokens of equal z share their fate. So what is
left is a window of the values in falling order, and one cut after the other narrows it. Each cut sees the distribution
that those before it left, as transformers' warpers do.

Plain torch, without a look at a value by the host. Sums are cumulative ones, whose order depends on the row alone, in
float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Left:
    """R rows.

    values: float32 [R, V], falling; scaled: float64 [R, V], (z - max z) / T
    weights, mass_to: float64 [R, V], w and its sum up to each place
    start, end: int64 [R], the window, never empty
    sigma: float64 [R], the standard deviation of the finite logits; NaN where no cut needs it
    """

    values: Tensor
    scaled: Tensor
    weights: Tensor
    mass_to: Tensor
    start: Tensor
    end: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, values: Tensor, temperature: Tensor, sigma: Tensor | None = None) -> Left:
        """values: float32 [R, V], falling; temperature: float64 [R], > 0."""
        rows, vocabulary = values.shape
        # 0 for the largest of a row of -inf, too
        scaled = (values - values[:, :1].nan_to_num(neginf=0.0)).double() / temperature[:, None]
        weights = scaled.exp()
        start = torch.zeros(rows, dtype=torch.int64, device=values.device)
        sigma = torch.full_like(scaled[:, 0], torch.nan) if sigma is None else sigma
        return cls(values, scaled, weights, weights.cumsum(1), start, start + vocabulary, sigma)

    def __getitem__(self, rows: Tensor) -> Left:
        return Left(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def put(self, rows: Tensor, part: Left) -> None:
        """Take over the windows of `part`, which was `self[rows]`."""
        self.start[rows], self.end[rows] = part.start, part.end

    def inside(self) -> Tensor:
        """bool [R, V], what is in the window."""
        place = torch.arange(self.values.shape[1], device=self.values.device)
        return (place >= self.start[:, None]) & (place < self.end[:, None])

    def mass(self) -> Tensor:
        """M, float64 [R]."""
        before = torch.where(self.start > 0, self._at(self.mass_to, (self.start - 1).clamp(min=0)), 0.0)
        return self._at(self.mass_to, self.end - 1) - before

    def energy(self) -> Tensor:
        """E, float64 [R]. What has no weight adds nothing, -inf included."""
        terms = torch.where(self.inside() & (self.weights > 0), self.weights * self.scaled, 0.0)
        return terms.cumsum(1)[:, -1]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that are left, float32 [R] each."""
        return self._at(self.values, self.end - 1), self._at(self.values, self.start)

    def up_to_equals(self, end: Tensor) -> Tensor:
        """`end`, int64 [R] in 1..V, moved behind the last value that equals the one before it."""
        least = self._at(self.values, end - 1)
        return (self.values >= least[:, None]).sum(1)

    def shorten(self, end: Tensor) -> None:
        """Keep what comes before `end`, and always the largest and its equals."""
        least = torch.maximum(self.up_to_equals(self.start + 1), self.start + 1)  # NaN equals nothing
        self.end = torch.minimum(torch.maximum(end, least), self.end)

    @staticmethod
    def _at(table: Tensor, place: Tensor) -> Tensor:
        return table.gather(1, place[:, None])[:, 0]
