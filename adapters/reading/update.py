"""What every method comes to, for one linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Update:
    """What one linear gets: y = (1 + gain) ⊙ y0 + scaling · B A x + shift.

    a: [r, K] and b: [N, r], None without a low-rank part; gain and shift: float32 [N], None for zeros.
    """

    a: Tensor | None
    b: Tensor | None
    scaling: float
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def vectors(self) -> Tensor | None:
        """gain and shift, float32 [2, N]; None where both are zero."""
        known = self.gain if self.gain is not None else self.shift
        if known is None:
            return None
        zeros = torch.zeros_like(known)
        return torch.stack([zeros if each is None else each for each in (self.gain, self.shift)])
