"""Adapters of random content over a small model, and what a pool must hold of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear, page_count
from lorry.adapters.device.pool import PagePool
from lorry.adapters.device.tables import LENGTH
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.kernels.lora import BYTES, END_SITES, SITES, VECTORS, AdapterPages

LAYOUT = ModelLayout(
    layers=2,
    sites={"q_proj": (37, 43), "k_proj": (37, 13), "o_proj": (43, 37), "down_proj": (59, 37)},
    ends={"embed_tokens": (53, 37), "lm_head": (37, 53)},
)
EVERYWHERE = [*LAYOUT.linears(), *((ENDS, site) for site in LAYOUT.ends)]
LARGEST = 16 * 96 * 2  # bytes of the largest page

RANKS = st.dictionaries(
    st.sampled_from(EVERYWHERE), st.sampled_from([0, 1, 15, 16, 17, 40, 64, 272, 280]), min_size=1, max_size=8
)


def adapter(
    seed: int, ranks: dict[Linear, int], dtype: torch.dtype = torch.bfloat16, layout: ModelLayout = LAYOUT
) -> CanonicalAdapter:
    generator = torch.Generator().manual_seed(seed)
    linears = {}
    for linear, rank in ranks.items():
        shape = page_count(rank), layout.page_elements(linear[1], dtype)
        pages = (torch.randn(shape, generator=generator) * (20 if dtype in BYTES else 1)).to(dtype)
        has_vectors = rank in (0, 15, 272)
        vectors = torch.randn(2, layout.shape(linear[1])[1], generator=generator) if has_vectors else None
        linears[linear] = CanonicalLinear(pages, seed + 0.5, vectors)
    sites = tuple(site for site in SITES if any(site == key[1] for key in ranks))
    return CanonicalAdapter(linears, max(ranks.values()), sites, ("lora",), f"{seed:064x}")


class NoBase:
    """Weights that no method of the test asks for."""

    def weight(self, linear: Linear) -> Tensor:
        raise AssertionError(f"the weight of {linear} is read")

    def bias(self, linear: Linear) -> Tensor | None:
        raise AssertionError(f"the bias of {linear} is read")


def assert_tables(tables: AdapterPages, slots: Sequence[int], expected: CanonicalAdapter) -> list[tuple[int, Tensor]]:
    """The tables of an adapter's slots are those of `expected`; where they lead, with what must be there."""
    assert tables.ends is not None
    rows = [
        (tables, layer, column, (layer, site)) for layer in range(LAYOUT.layers) for column, site in enumerate(SITES)
    ]
    rows += [(tables.ends, 0, column, (ENDS, site)) for column, site in enumerate(END_SITES)]
    pages = []
    for table, layer, column, key in rows:
        linear, places = expected.linears.get(key), list[int]()
        for number, slot in enumerate(slots):
            own = [offset for offset in table.offsets[slot, layer, column].tolist() if offset >= 0]
            assert table.offsets[slot, layer, column, : len(own)].tolist() == own, "used pages come first"
            assert float(table.scaling[slot, layer, column]) == (linear.scaling if linear and own else 0)
            assert not own or len(places) == number * LENGTH, "a slot is full before the next one begins"
            places += own
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


def assert_holds(pool: PagePool, slot: int, expected: CanonicalAdapter) -> None:
    """The kernels' tables of an adapter's slots lead to the pages of `expected`."""
    for offset, page in assert_tables(pool.pages, pool.all_slots(slot), expected):
        assert_page(pool.pages.arena, offset, page)
