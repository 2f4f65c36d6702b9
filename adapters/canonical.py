"""The one form that the pool and the kernels know: rank pages per adapted linear, the scale kept apart, and vectors.

    y = (1 + gain) ⊙ y0 + s · Σ_pages (x·Aᵀ)·B + shift

A page is A [16, K] followed by B [16, N], B stored transposed, both rows contiguous; ranks beyond a multiple of 16 are
zeros. In 8 bits the ranks' scales come first. What PEFT's methods make of their tensors to become this, `methods.py`
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.layout import Linear, ModelLayout
from lorry.adapters.pace import Rest, no_rest
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.checkpoint import LinearTensors
from lorry.adapters.reading.methods import update_of
from lorry.adapters.reading.replaced import without_the_bases
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.tensor_file import is_finite
from lorry.adapters.reading.update import Update
from lorry.kernels.lora import BYTES, END_SITES, PAGE_RANK, SITES, page_elements, page_parts, vector_elements


@dataclass(frozen=True, eq=False)
class CanonicalLinear:
    """One adapted linear: pages [P, elements of a page] in the pool's dtype and its scaling s.

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
    """One revision of an adapter in host memory. rank: the largest; methods: what it is made of, such as "rslora".

    additive: it is a sum that has a multiple: no gain, and no bias in place of the base's.
    invocation_tokens: of an activated LoRA, which acts from the last of these in a prompt on; else empty.
    """

    linears: Mapping[Linear, CanonicalLinear]
    rank: int
    target_modules: tuple[str, ...]
    methods: tuple[str, ...]
    revision: str
    additive: bool = True
    invocation_tokens: tuple[int, ...] = ()

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
    """[⌈r/16⌉, elements of a page] of `dtype` from A [r, K] and B [N, r].

    In 8 bits each rank of A and of B is scaled so that its largest number is the type's. Blocks of 64 instead of whole
    ranks would take 15% off the error of int8 and 4% off that of e4m3 (docs/performance.md).
    """
    rank, in_features = a.shape
    count = page_count(rank)
    pages = torch.empty(count, page_elements(in_features, b.shape[0], dtype), dtype=dtype)
    if rank % PAGE_RANK:
        pages[-1].zero_()
    for index in range(count):
        ranks = slice(index * PAGE_RANK, min((index + 1) * PAGE_RANK, rank))
        used = ranks.stop - ranks.start
        page_a, page_b, scales = page_parts(pages[index], in_features, b.shape[0])
        if dtype in BYTES:
            page_a[:used], scale_a = to_bytes(a[ranks], dtype)
            page_b[:used], scale_b = to_bytes(b[:, ranks].T, dtype)
            scales[:used] = scale_a * scale_b
        else:
            page_a[:used] = a[ranks]
            page_b[:used] = b[:, ranks].T
    return pages


def to_bytes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [R, C] of `dtype` and scales, float64 [R], of rows: x ≈ codes · scale, to nearest; a row of zeros has 0."""
    x = x.float()
    largest = x.abs().amax(dim=1)
    scaled = x / torch.where(largest > 0, largest, 1.0)[:, None] * BYTES[dtype]
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), largest.double() / BYTES[dtype]


def pages_are_finite(pages: Tensor, in_features: int, out_features: int) -> bool:
    """Whether all numbers are that the pages stand for."""
    if pages.dtype not in BYTES:
        return is_finite(pages)
    return all(is_finite(page_parts(page, in_features, out_features)[2]) for page in pages)


def _fits(update: Update, own: LinearTensors, dtype: torch.dtype) -> bool:
    """Whether the update holds the file's numbers, which are finite, and `dtype` holds them all."""
    if update.a is not own.a or update.b is not own.b or dtype in BYTES:
        return False
    return dtype == torch.float32 or all(each is None or each.dtype == dtype for each in (own.a, own.b))


def canonicalise(
    tensors: Mapping[Linear, LinearTensors],
    spec: AdapterSpec,
    layout: ModelLayout,
    base: BaseWeights,
    dtype: torch.dtype,
    revision: str,
    rest: Rest = no_rest,
) -> CanonicalAdapter:
    """The canonical form of checked tensors; raises MalformedAdapter for values that `dtype` cannot hold.

    rest: called between two linears.
    """
    linears, rank, additive = {}, 0, True
    for linear, own in without_the_bases(tensors, layout, base).items():
        rest()
        path = layout.module_path(*linear)
        update = update_of(linear, path, own, spec, base)
        replaces = own.weight is not None or own.rows is not None
        additive &= update.gain is None and own.bias is None and not replaces
        if update.a is None or update.b is None:
            pages = torch.empty(0, layout.page_elements(linear[1], dtype), dtype=dtype)
        else:
            pages = to_pages(update.a, update.b, dtype)
            rank = max(rank, 0 if replaces else update.a.shape[0])
        if not _fits(update, own, dtype) and not pages_are_finite(pages, *layout.shape(linear[1])):
            name = str(dtype).removeprefix("torch.")
            raise MalformedAdapter(f"{path} has values that are too large for the pool's {name}", path)
        if len(pages) or update.vectors is not None:
            linears[linear] = CanonicalLinear(pages, update.scaling, update.vectors)
    return CanonicalAdapter(
        linears=linears,
        rank=rank,
        target_modules=tuple(site for site in (*SITES, *END_SITES) if any(site == key[1] for key in linears)),
        methods=spec.methods,
        revision=revision,
        additive=additive,
        invocation_tokens=spec.invocation_tokens,
    )
