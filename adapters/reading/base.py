"""The base model as a method sees it that computes with its weights when it is loaded."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lorry.adapters.layout import Linear


class BaseWeights(Protocol):
    """Weights and biases of the adaptable linears, the ends among them, in host memory; asked for in the loader's
    thread."""

    @property
    def vocab_size(self) -> int: ...

    def weight(self, linear: Linear) -> Tensor:
        """float32 [N, K], dequantized; the caller's own."""
        ...

    def embedding(self, ids: Tensor) -> Tensor:
        """float32 [n, H]: rows of the embedding; ids: int64 [n]."""
        ...

    def head(self, ids: Tensor) -> Tensor:
        """float32 [n, H]: rows of the head's matrix, which is the embedding's where the base is tied."""
        ...

    def bias(self, linear: Linear) -> Tensor | None:
        """float32 [N]; None: the linear has none."""
        ...
