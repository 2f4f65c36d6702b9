"""Adapters of random content over a small model, and what a pool must hold of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear, page_count
from lorry.adapters.layout import Linear, ModelLayout
from lorry.kernels.lora import SITES, VECTORS, AdapterPages

LAYOUT = ModelLayout(
    layers=2, sites={"q_proj": (37, 43), "k_proj": (37, 13), "o_proj": (43, 37), "down_proj": (59, 37)}
)
LARGEST = 16 * 96 * 2  # bytes of the largest page

RANKS = st.dictionaries(
    st.sampled_from(list(LAYOUT.linears())), st.sampled_from([0, 1, 15, 16, 17, 40, 64]), min_size=1, max_size=8
)


def adapter(
    seed: int, ranks: dict[Linear, int], dtype: torch.dtype = torch.bfloat16, layout: ModelLayout = LAYOUT
) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for linear, rank in ranks.items():
        shape = page_count(rank), layout.page_elements(linear[1])
        pages = torch.randn(shape, generator=generator).to(dtype)
        has_vectors = rank in (0, 15)
        vectors = torch.randn(2, layout.sites[linear[1]][1], generator=generator) if has_vectors else None
        linears[linear] = CanonicalLinear(pages, seed + 0.5, vectors)
    sites = tuple(site for site in SITES if any(site == key[1] for key in ranks))
    return CanonicalAdapter(linears, max(ranks.values()), sites, ("lora",), f"{seed:064x}")


class NoBase:
    """Weights that no method of the test asks for."""

    def weight(self, linear: Linear) -> Tensor:
        raise AssertionError(f"the weight of {linear} is read")

    def bias(self, linear: Linear) -> Tensor | None:
        raise AssertionError(f"the bias of {linear} is read")


def assert_tables(offsets: Tensor, scaling: Tensor, expected: CanonicalAdapter) -> list[tuple[int, Tensor]]:
    """A slot's tables are those of `expected`; where they lead, with what must be there."""
    pages = []
    for layer in range(LAYOUT.layers):
        for column, site in enumerate(SITES):
            linear = expected.linears.get((layer, site))
            places = [offset for offset in offsets[layer, column].tolist() if offset >= 0]
            assert offsets[layer, column, : len(places)].tolist() == places, "used pages come first"
            assert float(scaling[layer, column]) == (0 if linear is None else linear.scaling)
            if linear is None:
                assert not places
                continue
            count = linear.pages.shape[0]
            flags = [0] * count + [VECTORS] * (linear.vectors is not None)
            assert [offset % 8 for offset in places] == flags
            for index, (offset, flag) in enumerate(zip(places, flags, strict=True)):
                pages.append((offset - flag, linear.page(index)))
    return pages


def assert_page(arena: Tensor, offset: int, page: Tensor) -> None:
    there = arena[offset : offset + page.numel()]
    assert torch.equal(there.view(torch.uint8), page.view(torch.uint8)), f"another page at {offset}"


def assert_holds(pages: AdapterPages, slot: int, expected: CanonicalAdapter) -> None:
    """The kernels' tables of `slot` lead to the pages of `expected`."""
    for offset, page in assert_tables(pages.offsets[slot], pages.scaling[slot], expected):
        assert_page(pages.arena, offset, page)
