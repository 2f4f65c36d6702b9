from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorry.adapters.canonical import to_pages
from lorry.kernels.lora import (
    EMBEDDING,
    SITES,
    VECTORS,
    AdapterPages,
    Segments,
    Site,
    lora_add,
    lora_add_reference,
    lora_embed,
    lora_embed_reference,
    vector_elements,
)

Measure = Callable[[Tensor, Tensor], float]
pytestmark = pytest.mark.usefixtures("kernels")
LAYERS, PAGES = 3, 6
RANKS = (8, 16, 40, 80, 33, 1, 16, 24)  # adapters of the pool; 16 ranks a page, the last one zero-padded

# Adapters of each row, as (slots, weights); every list is cut into segments of equal neighbours.
ONE = ((2, -1), (1.0, 0.0))
NONE = ((-1, -1), (0.0, 0.0))
POPULARITY = {
    "none": [NONE] * 9,
    "one": [ONE],
    "identical": [ONE] * 23,
    "distinct": [((slot, -1), (1.0, 0.0)) for slot in range(8)],
    "zipf": [((slot, -1), (1.0, 0.0)) for slot, count in enumerate((17, 8, 5, 4, 3, 2, 2, 1)) for _ in range(count)],
    "skewed": [((0, -1), (1.0, 0.0))] * 31 + [((slot, -1), (1.0, 0.0)) for slot in range(1, 4)],
    "mixes": [((1, 3), (0.7, -0.4))] * 5 + [NONE] * 2 + [((-1, 4), (0.0, 2.0))] + [((6, 6), (0.5, 0.5))] * 3,
}


def pool(k: int, sizes: dict[str, int], dtype: torch.dtype) -> AdapterPages:
    """Pages scattered over the arena with gaps of NaN.

    Adapters 1, 5 and 6 have vectors; adapter 5 has nothing but these at the first site.
    """
    offsets = torch.full((len(RANKS), LAYERS, len(SITES), PAGES), -1, dtype=torch.int64)
    pieces, end = [], 0
    for slot, rank in enumerate(RANKS):
        for layer in range(LAYERS):
            for name, n in sizes.items():
                rank_here = 0 if slot == 5 and name == next(iter(sizes)) else rank
                a, b = torch.randn(rank_here, k) / k**0.5, torch.randn(rank_here, n)
                own = []
                for page in range(-(-rank_here // 16)):
                    padded_a, padded_b = torch.zeros(16, k), torch.zeros(16, n)
                    part = slice(16 * page, min(rank_here, 16 * page + 16))
                    padded_a[: part.stop - part.start], padded_b[: part.stop - part.start] = a[part], b[part]
                    own.append((to_pages(padded_a, padded_b.T, dtype)[0], 0))
                if slot in (1, 5, 6):
                    vectors = poison(vector_elements(n, dtype), dtype)
                    vectors.view(torch.float32)[: 2 * n] = torch.randn(2 * n)
                    own.append((vectors, VECTORS))
                for index, (page, flag) in enumerate(own):
                    offsets[slot, layer, SITES.index(name), index] = end + flag
                    pieces += [page, poison(16, dtype)]
                    end += page.numel() + 16
    arena = torch.cat([piece.view(torch.uint8) for piece in pieces]).view(dtype)
    return AdapterPages(arena, offsets, torch.rand(len(RANKS), LAYERS, len(SITES)) + 0.5)


def poison(size: int, dtype: torch.dtype) -> Tensor:
    """What nobody may read: NaN, where the type has it."""
    return torch.full((size,), 127 if dtype is torch.int8 else float("nan"), dtype=dtype)


def segments(rows: list[tuple[tuple[int, int], tuple[float, float]]]) -> Segments:
    """One segment per run of equal rows, and an empty one after the first."""
    starts, combos = [0], []
    for i, row in enumerate(rows):
        if i + 1 == len(rows) or rows[i + 1] != row:
            starts.append(i + 1)
            combos.append(row)
    starts.insert(1, starts[1])
    combos.insert(1, ONE)
    slots, weights = zip(*combos, strict=True)
    return Segments(torch.tensor(starts).int(), torch.tensor(slots).int(), torch.tensor(weights))


def sites_of(sizes: dict[str, int], gap: int) -> tuple[tuple[Site, ...], int]:
    sites, start = [], 0
    for name, n in sizes.items():
        sites.append(Site(SITES.index(name), start, n))
        start += n + gap
    return tuple(sites), start


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(
    ("k", "sizes", "dtype"),
    [
        (95, {"q_proj": 33, "k_proj": 17, "v_proj": 9}, torch.float32),
        (64, {"gate_proj": 80, "up_proj": 80}, torch.bfloat16),
        (577, {"down_proj": 1031}, torch.float16),
        (95, {"q_proj": 33, "k_proj": 17, "v_proj": 9}, torch.int8),
        (577, {"down_proj": 1031}, torch.float8_e4m3fn),
    ],
)
def test_equals_the_reference_and_its_solo_row(
    popularity: str, k: int, sizes: dict[str, int], dtype: torch.dtype, relative_rms: Measure
) -> None:
    pages = pool(k, sizes, dtype)
    sites, width = sites_of(sizes, gap=0)
    rows = POPULARITY[popularity]
    x, base = torch.randn(len(rows), k), torch.randn(len(rows), width)
    expected, y = base.clone(), base.clone()
    lora_add_reference(expected, x, pages, 1, sites, segments(rows))
    lora_add(y, x, pages, 1, sites, segments(rows))
    assert relative_rms(y, expected) < 1e-6
    if popularity != "none":
        assert relative_rms(y - base, expected - base) < 2e-6
    for i in range(0, len(rows), 5):
        solo = base[i : i + 1].clone()
        lora_add(solo, x[i : i + 1], pages, 1, sites, segments(rows[i : i + 1]))
        assert torch.equal(solo[0], y[i]), i
        if rows[i] == NONE:
            assert torch.equal(y[i], base[i])


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("vocabulary", "hidden", "dtype"), [(211, 33, torch.float32), (97, 80, torch.int8)])
def test_embeddings_are_products_with_one_hot_vectors(
    popularity: str, vocabulary: int, hidden: int, dtype: torch.dtype, relative_rms: Measure
) -> None:
    pages = pool(vocabulary, {SITES[EMBEDDING]: hidden}, dtype)
    rows = POPULARITY[popularity]
    token_ids, base = torch.randint(vocabulary, (len(rows),)), torch.randn(len(rows), hidden)
    token_ids[0] = vocabulary - 1
    expected, y, plain = base.clone(), base.clone(), base.clone()
    x = torch.nn.functional.one_hot(token_ids, vocabulary).float()
    lora_add_reference(expected, x, pages, 0, (Site(EMBEDDING, 0, hidden),), segments(rows))
    lora_embed_reference(plain, token_ids, vocabulary, pages, segments(rows))
    lora_embed(y, token_ids, vocabulary, pages, segments(rows))
    assert relative_rms(plain, expected) < 1e-6
    assert relative_rms(y, expected) < 1e-6
    for i in range(0, len(rows), 5):
        solo = base[i : i + 1].clone()
        lora_embed(solo, token_ids[i : i + 1], vocabulary, pages, segments(rows[i : i + 1]))
        assert torch.equal(solo[0], y[i]), i


def test_columns_between_sites_and_rows_of_no_segment_stay(relative_rms: Measure) -> None:
    sizes = {"q_proj": 33, "v_proj": 17}
    pages = pool(48, sizes, torch.bfloat16)
    sites, width = sites_of(sizes, gap=6)
    wide = torch.randn(12, 48 + width + 5)
    x, y = wide[:, :48], wide[:, 48 : 48 + width]
    before = wide.clone()
    part = Segments(torch.tensor([2, 9]).int(), torch.tensor([[3]]).int(), torch.tensor([[1.5]]))
    expected = y.clone()
    lora_add_reference(expected, x, pages, 0, sites, part)
    lora_add(y, x, pages, 0, sites, part)
    assert relative_rms(y, expected) < 1e-6
    untouched = torch.ones_like(wide, dtype=torch.bool)
    untouched[2:9, 48:81] = untouched[2:9, 87:104] = False
    assert torch.equal(wide[untouched], before[untouched])


def test_determinism() -> None:
    sizes = {"gate_proj": 211, "up_proj": 211}
    pages = pool(192, sizes, torch.bfloat16)
    sites, width = sites_of(sizes, gap=0)
    rows = POPULARITY["zipf"]
    x, base = torch.randn(len(rows), 192), torch.randn(len(rows), width)
    results = []
    for _ in range(20):
        y = base.clone()
        lora_add(y, x, pages, 2, sites, segments(rows))
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)
