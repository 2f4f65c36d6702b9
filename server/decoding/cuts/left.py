"""What is left of a row's distribution, as a window over its largest values.

    w[i] = exp((z[i] - max z) / T)      p[i] = w[i] / M       M = Σ w over what is left
    H    = -Σ p log p = log M - E / M                         E = Σ w (z - max z) / T over what is left

Every cut keeps all tokens between a smallest and a largest logit, and tokens of equal z share their fate. So what is
left is a window of the values in falling order, and one cut after the other narrows it. Each cut sees the distribution
that those before it left, as transformers' warpers do.

The list need not hold the whole vocabulary. A row is then `whole`, nothing is cut yet; or `exact`, everything that is
left is in the list; or cut somewhere beyond the list, which a later cut may mend; or `lost`, since a cut needed sums of
what is not listed.

Plain torch, without a look at a value by the host: the same cuts serve a list of 128 values on the CPU and a sorted
vocabulary on a GPU. Sums are cumulative ones, whose order depends on the row alone, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Left:
    """R rows of the C largest values.

    values: float32 [R, C], falling; scaled: float64 [R, C], (z - max z) / T
    start, end: int64 [R], the window, never empty
    whole, exact, lost: bool [R], see above
    whole_mass, whole_energy, sigma: float64 [R], of the whole vocabulary M, E and the standard deviation of its finite
        logits; NaN where nobody needs them
    """

    values: Tensor
    scaled: Tensor
    weights: Tensor
    mass_to: Tensor
    start: Tensor
    end: Tensor
    whole: Tensor
    exact: Tensor
    lost: Tensor
    whole_mass: Tensor
    whole_energy: Tensor
    sigma: Tensor

    @classmethod
    def of(
        cls,
        values: Tensor,
        temperature: Tensor,
        complete: bool,
        whole_mass: Tensor | None = None,
        whole_energy: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Left:
        """values: float32 [R, C], falling; temperature: float32 [R], > 0; complete: the list is the vocabulary."""
        rows, listed = values.shape
        # 0 for the largest of a row of -inf, too
        scaled = (values - values[:, :1].nan_to_num(neginf=0.0)).double() / temperature[:, None]
        weights = scaled.exp()
        unknown = torch.full((rows,), torch.nan, dtype=torch.float64, device=values.device)
        flags = torch.full((rows,), complete, device=values.device)
        return cls(
            values,
            scaled,
            weights,
            weights.cumsum(1),
            torch.zeros(rows, dtype=torch.int64, device=values.device),
            torch.full((rows,), listed, device=values.device),
            ~flags,
            flags,
            torch.zeros_like(flags),
            *(unknown if statistic is None else statistic for statistic in (whole_mass, whole_energy, sigma)),
        )

    def __getitem__(self, rows: Tensor) -> Left:
        return Left(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def put(self, rows: Tensor, part: Left) -> None:
        """Take over the windows of `part`, which was `self[rows]`."""
        for name in ("start", "end", "whole", "exact", "lost"):
            getattr(self, name)[rows] = getattr(part, name)

    @property
    def listed(self) -> int:
        return self.values.shape[1]

    @property
    def known(self) -> Tensor:
        """bool [R], rows whose M is known."""
        return self.exact | self.whole

    def inside(self) -> Tensor:
        """bool [R, C], what of the list is in the window."""
        place = torch.arange(self.listed, device=self.values.device)
        return (place >= self.start[:, None]) & (place < self.end[:, None])

    def mass(self) -> Tensor:
        """M, float64 [R]; void where it is not known."""
        upto = self.mass_to.gather(1, self.end[:, None] - 1)[:, 0]
        before = torch.where(self.start > 0, self._at(self.mass_to, (self.start - 1).clamp(min=0)), 0.0)
        return torch.where(self.whole, self.whole_mass, upto - before)

    def energy(self) -> Tensor:
        """E, float64 [R]; void where M is not known. What has no weight adds nothing, -inf included."""
        terms = torch.where(self.inside() & (self.weights > 0), self.weights * self.scaled, 0.0)
        return torch.where(self.whole, self.whole_energy, terms.cumsum(1)[:, -1])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that are left, float32 [R] each."""
        return self._at(self.values, self.end - 1), self._at(self.values, self.start)

    def up_to_equals(self, end: Tensor) -> Tensor:
        """`end`, int64 [R] in 1..C, moved behind the last value that equals the one before it."""
        least = self._at(self.values, end - 1)
        return (self.values >= least[:, None]).sum(1)

    def shorten(self, end: Tensor, known: Tensor | None = None) -> None:
        """Keep what comes before `end`, and always the largest and its equals.

        known: bool [R], rows for which `end` is true of the whole vocabulary; others are lost. None: all.
        """
        least = torch.maximum(self.up_to_equals(self.start + 1), self.start + 1)  # NaN equals nothing
        end = torch.minimum(torch.maximum(end, least), self.end)
        if known is not None:
            self.lost = self.lost | ~known
            end = torch.where(known, end, self.end)
        self.exact = self.exact | (end < self.listed) & ~self.lost
        self.whole = torch.zeros_like(self.whole)
        self.end = end

    @staticmethod
    def _at(table: Tensor, place: Tensor) -> Tensor:
        return table.gather(1, place[:, None])[:, 0]
