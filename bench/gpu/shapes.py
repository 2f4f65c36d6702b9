"""The layer of Llama-3-8B, and one small enough for a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from gpu.measure import Stage

from lorry.kernels.lora import SITES


@dataclass(frozen=True)
class Layer:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Name → (N of each part, K)."""
        kv = self.kv_heads * self.head_dim
        return {
            "qkv": ((self.hidden, kv, kv), self.hidden),
            "o": ((self.hidden,), self.hidden),
            "gate_up": ((self.intermediate, self.intermediate), self.hidden),
            "down": ((self.hidden,), self.intermediate),
        }

    @property
    def page_sizes(self) -> dict[str, int]:
        """Elements of a rank page of each adapted linear: A [16, K] and B [16, N]."""
        sizes = [(n, k) for parts, k in self.linears.values() for n in parts]
        return {name: 16 * (n + k) for name, (n, k) in zip(SITES, sizes, strict=True)}


LLAMA = Layer(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128)
TINY = Layer(hidden=256, intermediate=192, heads=8, kv_heads=2, head_dim=32)


def layer(stage: Stage) -> Layer:
    return TINY if stage.dry else LLAMA
