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
from lorry.kernels.lora import PAGE_RANK, SITES, vector_elements


@dataclass(frozen=True, eq=False)
class CanonicalLinear:
    """One adapted linear: pages [P, 16·(K+N)] in the pool's dtype and its scaling s.

    vectors: float32 [2, N], gain - 1 and shift of the outputs, or None.
    """

    pages: Tensor
    scaling: float
    vectors: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self._vector_elements * self.pages.itemsize

    def page(self, index: int) -> Tensor:
        """What lies in the arena as this linear's page `index`, flat in the pool's dtype; behind the last: vectors."""
        return self.pages[index] if index < self.pages.shape[0] else self._vector_page()

    @property
    def _vector_elements(self) -> int:
        return 0 if self.vectors is None else vector_elements(self.vectors.shape[1], self.pages.dtype)

    def _vector_page(self) -> Tensor:
        assert self.vectors is not None
        page = torch.zeros(self._vector_elements, dtype=self.pages.dtype)
        page.view(torch.float32)[: self.vectors.numel()] = self.vectors.view(-1)
        return page


@dataclass(frozen=True, eq=False)
class CanonicalAdapter:
    """One revision of an adapter in host memory. rank: the largest; methods: what it is made of, such as "rslora"."""

    linears: Mapping[Linear, CanonicalLinear]
    rank: int
    target_modules: tuple[str, ...]
    methods: tuple[str, ...]
    revision: str

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self.linears.values())

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
    )
