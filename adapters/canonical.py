"""The one form that the pool and the kernels know: rank pages per adapted linear, the scale kept apart.

    Δy = s · Σ_pages (x·Aᵀ)·B,   page = A [16, K] followed by B [16, N], B stored transposed, both rows contiguous

Ranks beyond a multiple of 16 are zeros. Further PEFT methods become rank pages here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorry.adapters.checkpoint import Pairs
from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.layout import Linear, ModelLayout
from lorry.adapters.spec import AdapterSpec
from lorry.adapters.tensor_file import is_finite
from lorry.kernels.lora import PAGE_RANK, SITES


@dataclass(frozen=True, eq=False)
class CanonicalLinear:
    """One adapted linear: pages [P, 16·(K+N)] in the pool's dtype and its scaling s."""

    pages: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class CanonicalAdapter:
    """One revision of an adapter in host memory. rank: the largest; methods: what it is made of, such as "rslora".

    invocation_tokens: of an activated LoRA, which acts from the last of these in a prompt on; else empty.
    """

    linears: Mapping[Linear, CanonicalLinear]
    rank: int
    target_modules: tuple[str, ...]
    methods: tuple[str, ...]
    revision: str
    invocation_tokens: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(linear.pages.nbytes for linear in self.linears.values())

    def with_linears(self, linears: Mapping[Linear, CanonicalLinear]) -> CanonicalAdapter:
        """The same adapter over other pages."""
        return replace(self, linears=linears)

    def without_pages(self) -> CanonicalAdapter:
        """Only what is known about it."""
        return replace(self, linears={})


def page_count(rank: int) -> int:
    """⌈rank / 16⌉."""
    return -(-rank // PAGE_RANK)


def to_pages(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """[⌈r/16⌉, 16·(K+N)] of `dtype` from A [r, K] and B [N, r]."""
    rank, in_features = a.shape
    count = page_count(rank)
    pages = torch.empty(count, PAGE_RANK * (in_features + b.shape[0]), dtype=dtype)
    if rank % PAGE_RANK:
        pages[-1].zero_()
    split = PAGE_RANK * in_features
    for index in range(count):
        ranks = slice(index * PAGE_RANK, min((index + 1) * PAGE_RANK, rank))
        used = ranks.stop - ranks.start
        pages[index, :split].view(PAGE_RANK, -1)[:used] = a[ranks]
        pages[index, split:].view(PAGE_RANK, -1)[:used] = b[:, ranks].T
    return pages


def canonicalise(
    pairs: Pairs, spec: AdapterSpec, layout: ModelLayout, dtype: torch.dtype, revision: str
) -> CanonicalAdapter:
    """The canonical form of checked pairs; raises MalformedAdapter for values that `dtype` cannot hold."""
    linears = {}
    for linear, (a, b) in pairs.items():
        path = layout.module_path(*linear)
        pages = to_pages(a, b, dtype)
        if dtype != torch.float32 and not a.dtype == b.dtype == dtype and not is_finite(pages):
            name = str(dtype).removeprefix("torch.")
            raise MalformedAdapter(f"{path} has values that are too large for the pool's {name}", path)
        linears[linear] = CanonicalLinear(pages, spec.scaling_of(path))
    return CanonicalAdapter(
        linears=linears,
        rank=max(a.shape[0] for a, _ in pairs.values()),
        target_modules=tuple(site for site in SITES if any(site == key[1] for key in linears)),
        methods=spec.methods,
        revision=revision,
        invocation_tokens=spec.invocation_tokens,
    )
