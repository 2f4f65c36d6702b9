"""What a forward pass yields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.kernels.lora import Segments


@dataclass(frozen=True, slots=True)
class Output:
    """hidden: [R, H] of the batch's logits rows; logits: float32 [D, V] of the deciding ones, which come first; last:
    int64 [D], the token that each of these ran on. segments: `ModelInputs.logits_segments`. tapped: of each of
    `ModelInputs.taps` [P, H]; tap_segments: of these P rows."""

    hidden: Tensor
    logits: Tensor
    last: Tensor
    segments: Segments | None = None
    tapped: Sequence[Tensor] = ()
    tap_segments: Segments | None = None

    @classmethod
    def empty(cls, rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Output:
        """Memory for `rows` rows, all of which decide."""
        return cls(
            torch.empty(rows, hidden, dtype=dtype, device=device),
            torch.empty(rows, vocabulary, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.int64, device=device),
        )

    def first(self, rows: int) -> Output:
        """The first rows of it, all of which decide."""
        return Output(self.hidden[:rows], self.logits[:rows], self.last[:rows])
