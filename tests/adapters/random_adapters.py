"""Adapters of random content over a small model, and what a pool must hold of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear, page_count
from lorry.adapters.layout import Linear, ModelLayout
from lorry.kernels.lora import SITES, AdapterPages

LAYOUT = ModelLayout(
    layers=2, sites={"q_proj": (37, 43), "k_proj": (37, 13), "o_proj": (43, 37), "down_proj": (59, 37)}
)
LARGEST = 16 * 96 * 2  # bytes of the largest page

RANKS = st.dictionaries(
    st.sampled_from(list(LAYOUT.linears())), st.sampled_from([1, 15, 16, 17, 40, 64]), min_size=1, max_size=8
)


def adapter(
    seed: int, ranks: dict[Linear, int], dtype: torch.dtype = torch.bfloat16, layout: ModelLayout = LAYOUT
) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for linear, rank in ranks.items():
        shape = page_count(rank), layout.page_elements(linear[1])
        linears[linear] = CanonicalLinear(torch.randn(shape, generator=generator).to(dtype), seed + 0.5)
    sites = tuple(site for site in SITES if any(site == key[1] for key in ranks))
    return CanonicalAdapter(linears, max(ranks.values()), sites, ("lora",), f"{seed:064x}")


def assert_tables(offsets: Tensor, scaling: Tensor, expected: CanonicalAdapter) -> list[tuple[int, Tensor]]:
    """A slot's tables are those of `expected`; where they lead, with what must be there."""
    pages = []
    for layer in range(LAYOUT.layers):
        for column, site in enumerate(SITES):
            linear = expected.linears.get((layer, site))
            places = [offset for offset in offsets[layer, column].tolist() if offset >= 0]
            assert offsets[layer, column, : len(places)].tolist() == places, "used pages come first"
            assert len(places) == (0 if linear is None else linear.pages.shape[0])
            assert float(scaling[layer, column]) == (0 if linear is None else linear.scaling)
            pages += zip(places, () if linear is None else linear.pages, strict=True)
    return pages


def assert_page(arena: Tensor, offset: int, page: Tensor) -> None:
    assert torch.equal(arena[offset : offset + page.numel()], page), f"another page at {offset}"


def assert_holds(pages: AdapterPages, slot: int, expected: CanonicalAdapter) -> None:
    """The kernels' tables of `slot` lead to the pages of `expected`."""
    for offset, page in assert_tables(pages.offsets[slot], pages.scaling[slot], expected):
        assert_page(pages.arena, offset, page)
