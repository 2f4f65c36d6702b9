"""The base model as a method sees it that computes with its weights when it is loaded."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lorry.adapters.layout import Linear


class BaseWeights(Protocol):
    """Weights and biases of the adaptable linears, in host memory; asked for in the loader's thread."""

    def weight(self, linear: Linear) -> Tensor:
        """float32 [N, K], dequantized; the caller's own."""
        ...

    def bias(self, linear: Linear) -> Tensor | None:
        """float32 [N]; None: the linear has none."""
        ...
