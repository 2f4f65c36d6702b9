"""LoRA on a GPU or in the interpreter: routes, the two halves, the kernels that finish the sum, their assembly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.adapters.canonical import to_pages
from lorry.kernels.lora import (
    BYTES,
    EMBEDDING,
    SITES,
    VECTORS,
    AdapterPages,
    LoraTerm,
    Routes,
    Segments,
    Site,
    fill_routes,
    lora_add_reference,
    make_routes,
    shrink_splits,
    vector_elements,
)
from lorry.kernels.rms_norm import rms_norm_reference
from lorry.kernels.silu_mul import silu_mul_reference
from lorry.kernels.triton import lora as gpu
from lorry.kernels.triton.rms_norm import rms_norm
from lorry.kernels.triton.silu_mul import silu_mul

Measure = Callable[[Tensor, Tensor], float]
Row = tuple[tuple[int, ...], tuple[float, ...]]
LAYERS, MAX_PAGES, LAYER = 3, 4, 1
RANKS = (5, 16, 40, 16, 33, 1, 16)
VECTORED = (1, 4, 6)  # slots with a gain and a shift at every site

ONE, NONE = ((2, -1), (1.0, 0.0)), ((-1, -1), (0.0, 0.0))
MIXES: dict[str, list[Row]] = {
    "none": [NONE] * 5,
    "one": [ONE],
    "identical": [ONE] * 19,
    "distinct": [((slot, -1), (1.0, 0.0)) for slot in range(7)],
    "zipf": [((slot, -1), (1.0, 0.0)) for slot, count in enumerate((9, 4, 3, 2, 1)) for _ in range(count)],
    "skewed": [((1, -1), (1.0, 0.0))] * 35 + [((slot, -1), (1.0, 0.0)) for slot in (4, 6)],
    "weighted": [NONE] * 2
    + [((1, 2), (0.7, -0.4))] * 3
    + [NONE]
    + [((-1, 4), (0.0, 2.0))]
    + [((2, 2), (0.5, 0.5))] * 2,
}
SHAPES = [  # K, N of the sites, dtype of the arena and of x
    (72, {"q_proj": 40, "k_proj": 24, "v_proj": 8}, torch.float32),
    (136, {"gate_proj": 88, "up_proj": 88}, torch.bfloat16),
    (1032, {"down_proj": 136}, torch.float16),  # two splits of K
    (1032, {"down_proj": 136}, torch.int8),
    (72, {"q_proj": 40, "k_proj": 24, "v_proj": 8}, torch.float8_e4m3fn),
]
MIXES_OF_SHAPES = (["distinct", "weighted"], list(MIXES), ["zipf", "weighted"], ["weighted"], ["distinct", "weighted"])


@pytest.fixture(autouse=True)
def _poison(poison: None) -> None:
    """Workspaces, routes and outputs begin as NaN."""


def pool(k: int, sizes: dict[str, int], dtype: torch.dtype, device: str) -> AdapterPages:
    """Pages scattered over the arena with gaps of NaN.

    Adapters 1, 4 and 6 have vectors; adapter 6 has nothing else at the first site.
    """
    offsets = torch.full((len(RANKS), LAYERS, len(SITES), MAX_PAGES), -1, dtype=torch.int64)
    gap = unread(32, dtype)
    pieces, end = [gap], 32
    for slot, rank in enumerate(RANKS):
        for name, n in sizes.items():
            own: list[tuple[Tensor, int]] = []
            for page in range(0 if slot == 6 and name == next(iter(sizes)) else -(-rank // 16)):
                a, b = torch.randn(16, k) / k**0.5, torch.randn(16, n)
                a[rank - 16 * page :], b[rank - 16 * page :] = 0, 0
                own.append((to_pages(a, b.T, dtype)[0], 0))
            if slot in VECTORED:
                vectors = unread(vector_elements(n, dtype), dtype)
                vectors.view(torch.float32)[: 2 * n] = torch.randn(2 * n)
                own.append((vectors, VECTORS))
            for index, (page_, flag) in enumerate(own):
                offsets[slot, LAYER, SITES.index(name), index] = end + flag
                pieces += [page_, gap]
                end += page_.numel() + 32
    scaling = torch.rand(len(RANKS), LAYERS, len(SITES)) + 0.5
    arena = torch.cat([piece.view(torch.uint8) for piece in pieces]).view(dtype)
    return AdapterPages(arena.to(device), offsets.to(device), scaling.to(device))


def unread(size: int, dtype: torch.dtype) -> Tensor:
    """What nobody may read: NaN, where the type has it."""
    return torch.full((size,), 127 if dtype is torch.int8 else float("nan"), dtype=dtype)


def segments_of(rows: list[Row], device: str) -> Segments:
    """One segment for each run of equal rows, and an empty one after the first."""
    starts, combos = [0], []
    for i, row in enumerate(rows):
        if i + 1 == len(rows) or rows[i + 1] != row:
            starts.append(i + 1)
            combos.append(row)
    starts.insert(1, starts[1])
    combos.insert(1, ONE)
    slots, weights = zip(*combos, strict=True)
    return Segments(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
    )


def sites_of(sizes: dict[str, int], gap: int = 0) -> tuple[tuple[Site, ...], int]:
    sites, start = [], 0
    for name, n in sizes.items():
        sites.append(Site(SITES.index(name), start, n))
        start += n + gap
    return tuple(sites), start


def routes_of(segments: Segments, rows: int, pages: AdapterPages, k: int, sites: int, more: int = 0) -> Routes:
    """Filled routes; `more`: capacity that the batch does not need."""
    own = [-(-rank // 16) + (slot in VECTORED) for slot, rank in enumerate(RANKS)]
    most = max(sum(own[slot] for slot in slots if slot >= 0) for slots in segments.slots.tolist())
    routes = make_routes(rows + more, len(segments.slots) + more, most + more // 3, pages, [(k, sites), (5, 1)])
    for table in (routes.tiles, routes.row_segment, routes.page_offsets):
        table.fill_(1234567)
    fill_routes(routes, segments, pages, rows)
    return routes


def expected_sum(x: Tensor, base: Tensor, pages: AdapterPages, sites: tuple[Site, ...], segments: Segments) -> Tensor:
    """What the adapters add to base [M, width], float64."""
    total = base.double()
    lora_add_reference(total, x, pages, LAYER, sites, segments)
    return total - base


def strided(values: Tensor, more: int) -> Tensor:
    """The same values with rows further apart."""
    return torch.cat([values, torch.full_like(values[:, :more], float("nan"))], dim=1)[:, : values.shape[1]]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("tile_rows", "more"), [(16, 0), (16, 11), (64, 5)])
def test_routes(mix: str, tile_rows: int, more: int, device: str) -> None:
    rows = MIXES[mix]
    pages, segments = pool(24, {"q_proj": 16, "o_proj": 8}, torch.float32, device), segments_of(rows, device)
    routes = replace(routes_of(segments, len(rows), pages, 24, 1, more), tile_rows=tile_rows)
    fill_routes(routes, segments, pages, len(rows))
    adapted = [row != NONE for row in rows]
    starts, row_segment = segments.starts.tolist(), routes.row_segment.tolist()
    expected = [-1] * routes.capacity
    for segment in range(len(starts) - 1):
        expected[starts[segment] : starts[segment + 1]] = [segment] * (starts[segment + 1] - starts[segment])
    assert row_segment == [s if i < len(rows) and adapted[i] else -1 for i, s in enumerate(expected)]
    end, unused = 0, False
    for start, count, segment in routes.tiles.tolist():
        unused |= count == 0
        assert not (unused and count)
        if count:
            assert start == end
            assert count <= tile_rows
            assert len({expected[row] for row in range(start, start + count)}) == 1
            assert segment == row_segment[start]
            assert count == tile_rows or start + count in starts
            end = start + count
    assert end == len(rows)
    for segment, (slots, weights) in enumerate(zip(segments.slots.tolist(), segments.weights.tolist(), strict=True)):
        for layer in range(LAYERS):
            for site in range(len(SITES)):
                own = [
                    (int(offset), weight if offset % 2 else weight * float(pages.scaling[slot, layer, site]))
                    for slot, weight in zip(slots, weights, strict=True)
                    if slot >= 0
                    for offset in pages.offsets[slot, layer, site]
                    if offset >= 0
                ]
                numbers, *offsets = routes.page_offsets[segment, layer, site].tolist()
                scales = routes.page_scales[segment, layer, site, 1:].tolist()
                listed = list(zip(offsets, scales, strict=True))
                count, vectors = numbers % 2**32, numbers >> 32
                of_pages = [(offset, pytest.approx(scale)) for offset, scale in own if offset % 2 == 0]
                of_vectors = [(offset, pytest.approx(scale)) for offset, scale in own if offset % 2 == VECTORS]
                assert (count, vectors) == (len(of_pages), len(of_vectors))
                assert listed[:count] == of_pages
                assert listed[::-1][:vectors] == of_vectors


def test_routes_of_rows_outside_all_segments(device: str) -> None:
    pages = pool(24, {"q_proj": 16}, torch.float32, device)
    part = Segments(
        *(tensor.to(device) for tensor in (torch.tensor([2, 9, 9, 21]).int(), torch.tensor([[3], [1], [-1]]).int())),
        torch.ones(3, 1, device=device),
    )
    routes = routes_of(part, 24, pages, 24, 1, more=6)
    assert routes.row_segment.tolist() == [-1, -1] + [0] * 7 + [-1] * 21
    used = [tile for tile in routes.tiles.tolist() if tile[1]]
    assert used == [[0, 2, -1], [2, 7, 0], [9, 12, -1], [21, 3, -1]]
    nothing = Segments(torch.tensor([0]).int(), torch.empty(0, 0).int(), torch.empty(0, 0))
    fill_routes(routes, nothing, pages, 17)
    assert [tile for tile in routes.tiles.tolist() if tile[1]] == [[0, 16, -1], [16, 1, -1]]
    with pytest.raises(ValueError, match="31 rows in 3 segments do not fit routes for 30 rows"):
        fill_routes(routes, part, pages, 31)


@pytest.mark.parametrize(
    ("k", "sizes", "dtype", "mix"),
    [(*shape, mix) for shape, mixes in zip(SHAPES, MIXES_OF_SHAPES, strict=True) for mix in mixes],
)
def test_adds_what_the_reference_adds(
    k: int, sizes: dict[str, int], dtype: torch.dtype, mix: str, device: str, relative_rms: Measure
) -> None:
    rows, pages = MIXES[mix], pool(k, sizes, dtype, device)
    segments, (sites, width) = segments_of(rows, device), sites_of(sizes)
    x = strided(torch.randn(len(rows), k, device=device).to(torch.bfloat16 if dtype in BYTES else dtype), 8)
    base = torch.randn(len(rows), width, device=device)
    added = expected_sum(x, base, pages, sites, segments)
    routes = routes_of(segments, len(rows), pages, k, len(sites), more=1 + 2 * (k == 72))
    y = strided(base, 5)
    gpu.lora_add(y, x, pages, LAYER, sites, segments, routes)
    error, rounded = (y - (base + added)).abs().max(), dtype in (torch.bfloat16, *BYTES)
    assert error <= (3e-5 if rounded else 2e-6) * max(1.0, float(added.abs().max()))
    if mix == "none":
        assert torch.equal(y, base)
    else:
        assert relative_rms(y - base, added) < (1e-5 if rounded else 1e-6)
    i = len(rows) // 2
    solo, alone = base[i : i + 1].clone(), segments_of(rows[i : i + 1], device)
    gpu.lora_add(solo, x[i : i + 1], pages, LAYER, sites, alone, routes_of(alone, 1, pages, k, len(sites)))
    assert torch.equal(solo[0], y[i])


@pytest.mark.parametrize(("dtype", "y_dtype"), [(torch.float32, torch.float32), (torch.int8, torch.bfloat16)])
@pytest.mark.parametrize("mix", ["none", "distinct", "skewed", "weighted"])
def test_embeddings_are_products_with_one_hot_vectors(
    dtype: torch.dtype, y_dtype: torch.dtype, mix: str, device: str, relative_rms: Measure
) -> None:
    rows, vocabulary, hidden = MIXES[mix], 1096, 40  # more than one split of a product
    whole = pool(vocabulary, {SITES[EMBEDDING]: hidden}, dtype, device)
    own = slice(LAYER, LAYER + 1)
    pages = replace(whole, offsets=whole.offsets[:, own].contiguous(), scaling=whole.scaling[:, own].contiguous())
    segments = segments_of(rows, device)
    token_ids = torch.randint(vocabulary, (len(rows),), device=device)
    token_ids[0] = vocabulary - 1
    base = torch.randn(len(rows), hidden, device=device).to(y_dtype)
    x = torch.nn.functional.one_hot(token_ids, vocabulary).float()
    expected = base.double()
    lora_add_reference(expected, x, pages, 0, (Site(EMBEDDING, 0, hidden),), segments)
    y = base.clone()
    gpu.lora_embed(y, token_ids, vocabulary, pages, segments)
    assert relative_rms(y, expected) < (1e-6 if y_dtype is torch.float32 else 4e-3)
    if mix == "none":
        assert torch.equal(y, base)


def test_determinism(device: str) -> None:
    rows, pages = MIXES["skewed"], pool(264, {"o_proj": 136}, torch.bfloat16, device)
    segments, (sites, width) = segments_of(rows, device), sites_of({"o_proj": 136})
    x, base = torch.randn(len(rows), 264, device=device).bfloat16(), torch.randn(len(rows), width, device=device)
    routes, results = routes_of(segments, len(rows), pages, 264, 1), []
    for _ in range(100 if device == "cuda" else 2):
        y = base.clone()
        gpu.lora_add(y, x, pages, LAYER, sites, segments, routes)
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_y_is_rounded_once_and_once_more_with_vectors(dtype: torch.dtype, device: str) -> None:
    sizes = {"gate_proj": 24, "up_proj": 40}
    rows, pages = MIXES["weighted"], pool(80, sizes, dtype, device)
    segments, (sites, width) = segments_of(rows, device), sites_of(sizes)
    x, base = (
        torch.randn(len(rows), 80, device=device).to(dtype),
        torch.randn(len(rows), width, device=device).to(dtype),
    )
    exact = base.double() + expected_sum(x, base, pages, sites, segments)
    y = base.clone()
    gpu.lora_add(y, x, pages, LAYER, sites, segments)  # makes its own routes
    vectors = torch.where(pages.offsets % 2 == VECTORS, pages.offsets, -1).sort(-1, descending=True).values
    changed = base.double() + expected_sum(x, base, replace(pages, offsets=vectors), sites, segments)
    magnitude = exact.abs() + torch.where(changed == base, 0, changed.abs())
    bound = torch.finfo(dtype).eps / 2 * magnitude
    assert ((y - exact).abs() <= bound + 4e-4 * torch.finfo(dtype).eps * 256).all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_long_batches_and_other_dtypes(x_dtype: torch.dtype, device: str, relative_rms: Measure) -> None:
    """Tiles of 64 rows; x of a dtype that is not the arena's; a site between the two that is not adapted."""
    sizes = {"q_proj": 24, "v_proj": 152}
    rows = [ONE] * 67 + MIXES["weighted"][-4:] + [((1, -1), (1.0, 0.0))] * 3
    pages, segments = pool(136, sizes, torch.float16, device), segments_of(rows, device)
    sites, width = sites_of(sizes, gap=6)
    x = torch.randn(len(rows), 136, device=device).to(x_dtype)
    base = torch.randn(len(rows), width, device=device)
    routes = replace(routes_of(segments, len(rows), pages, 136, 1), tile_rows=64)
    fill_routes(routes, segments, pages, len(rows))
    y = base.clone()
    gpu.lora_add(y, x, pages, LAYER, sites, segments, routes)
    assert torch.equal(y[:, 24:30], base[:, 24:30])
    assert relative_rms(y - base, expected_sum(x, base, pages, sites, segments)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "mix"), [*product([torch.bfloat16], ["none", "one", "distinct", "weighted"]), (torch.float32, "zipf")]
)
def test_rms_norm_finishes_the_sum(dtype: torch.dtype, mix: str, device: str, relative_rms: Measure) -> None:
    k, width, rows = 136, 88, MIXES[mix]
    pages, segments = pool(k, {"down_proj": width}, dtype, device), segments_of(rows, device)
    sites = (Site(SITES.index("down_proj"), 0, width),)
    x = torch.randn(len(rows), k, device=device).to(dtype)
    out = strided(torch.randn(len(rows), width, device=device).to(dtype), 8)
    residual, weight = (
        torch.randn(len(rows), width, device=device).to(dtype),
        torch.randn(width, device=device).to(dtype),
    )
    routes = routes_of(segments, len(rows), pages, k, 1, more=2)
    term = LoraTerm(routes, pages, LAYER, sites, k)
    gpu.lora_shrink(x, term)
    sum_ = (out.double() + expected_sum(x, out, pages, sites, segments)).to(dtype)
    before, updated = out.clone(), residual.clone()
    y = rms_norm(out, weight, 1e-5, updated, term)
    expected = residual + sum_
    if dtype is torch.float32:
        assert relative_rms(updated, expected) < 1e-6
        assert relative_rms(y, rms_norm_reference(expected, weight, 1e-5)) < 1e-6
        assert relative_rms(rms_norm(out, weight, 1e-5, None, term), rms_norm_reference(sum_, weight, 1e-5)) < 1e-6
    else:  # float32 sums may round to the other neighbour
        assert (updated != expected).float().mean() < 0.01
        assert (y != rms_norm_reference(updated, weight, 1e-5)).float().mean() < 1e-3
    assert torch.equal(out, before)
    if len(rows) > 4:
        alone = segments_of(rows[4:5], device)
        one = LoraTerm(routes_of(alone, 1, pages, k, 1), pages, LAYER, sites, k)
        gpu.lora_shrink(x[4:5], one)
        assert torch.equal(rms_norm(out[4:5], weight, 1e-5, residual[4:5].clone(), one)[0], y[4])


@pytest.mark.parametrize(
    ("dtype", "tile_rows", "mix"),
    [
        *product([torch.bfloat16], [16], ["none", "one", "distinct", "weighted"]),
        (torch.float32, 16, "weighted"),
        (torch.float16, 64, "skewed"),
    ],
)
def test_silu_mul_finishes_the_sums(
    dtype: torch.dtype, tile_rows: int, mix: str, device: str, relative_rms: Measure
) -> None:
    k, half, rows = 72, 136, MIXES[mix]
    sizes = {"gate_proj": half, "up_proj": half}
    pages, segments = pool(k, sizes, dtype, device), segments_of(rows, device)
    sites, width = sites_of(sizes)
    x = torch.randn(len(rows), k, device=device).to(dtype)
    gate_up = strided(torch.randn(len(rows), width, device=device).to(dtype), 8)
    routes = replace(routes_of(segments, len(rows), pages, k, 2, more=2), tile_rows=tile_rows)
    fill_routes(routes, segments, pages, len(rows))
    term = LoraTerm(routes, pages, LAYER, sites, k)
    gpu.lora_shrink(x, term)
    y = silu_mul(gate_up, term)
    expected = silu_mul_reference((gate_up.double() + expected_sum(x, gate_up, pages, sites, segments)).to(dtype))
    assert relative_rms(y, expected) < (1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps / 4)
    if dtype is not torch.float32:
        assert (y != expected).float().mean() < 0.02
    base_rows = torch.tensor([row == NONE for row in rows], device=device)
    assert torch.equal(y[base_rows], silu_mul(gate_up)[base_rows])


def test_splits_depend_on_the_columns_alone() -> None:
    assert [shrink_splits(k) for k in (16, 1024, 1032, 4096, 14336)] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
def test_assembly(assembled: Callable[[str, int], list[Any]], dtype: str, architecture: int) -> None:
    """A and x go to shared memory 16 bytes at a time, B to registers; the tensor cores multiply; nothing spills."""
    for rows in (64, 4096):
        (shrink,) = assembled(f"lora shrink {dtype} {rows}", architecture)
        (expand,) = assembled(f"lora expand {dtype} {rows}", architecture)
        for kernel in (shrink, expand):
            assert kernel.spills == 0
            assert kernel.registers <= 168  # at least three programs to a multiprocessor
            assert kernel.count("HGMMA" if architecture == 90 and rows > 64 else "HMMA", "loop") > 0
        assert shrink.count("LDGSTS") == shrink.count("LDGSTS.E.BYPASS.128") > 0
        assert shrink.count("LDG.E.U16") == expand.count("LDG.E.U16") == 0
        assert expand.count("LDG.E.128", "loop") >= 2
        of_vectors = 1 if rows == 64 else 0  # a small part of a small tile
        assert expand.count("STG") - of_vectors == expand.count("STG.E.128") > 0


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["torch.int8", "torch.float8_e4m3fn"])
def test_assembly_of_8_bits(assembled: Callable[[str, int], list[Any]], dtype: str, architecture: int) -> None:
    """A goes to shared memory 16 bytes at a time; as many programs to a multiprocessor as in 16 bits."""
    for rows in (64, 4096):
        (shrink,) = assembled(f"lora shrink {dtype} {rows}", architecture)
        (expand,) = assembled(f"lora expand {dtype} {rows}", architecture)
        for kernel in (shrink, expand):
            assert kernel.spills == 0
            assert kernel.registers <= 168
            assert kernel.count("HGMMA" if architecture == 90 and rows > 64 else "HMMA", "loop") > 0
            assert kernel.count("LDG.E.U8") == kernel.count("LDG.E.U16") == 0
        assert shrink.count("LDGSTS") == shrink.count("LDGSTS.E.BYPASS.128") > 0
    for case in ("rms_norm residual lora int8", "silu_mul lora int8"):
        (kernel,) = assembled(case, architecture)
        assert kernel.spills == 0
        assert kernel.registers <= 168
        assert kernel.count("LDG.E.U8") == kernel.count("LDG.E.U16") == 0


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    "case", ["lora fill", "lora shrink float32", "lora expand float32", "lora gather", "lora head"]
)
def test_nothing_spills(assembled: Callable[[str, int], list[Any]], case: str, architecture: int) -> None:
    (kernel,) = assembled(case, architecture)
    assert kernel.spills == 0


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", ["rms_norm residual lora", "silu_mul lora"])
def test_assembly_of_the_kernels_that_finish(
    assembled: Callable[[str, int], list[Any]], case: str, architecture: int
) -> None:
    (kernel,) = assembled(case, architecture)
    assert kernel.spills == 0
    assert kernel.registers <= 128
    assert kernel.count("LDG.E.U16") == 0
    assert kernel.count("STG") == kernel.count("STG.E.128") > 0
    if case.startswith("silu"):
        assert kernel.count("HMMA", "loop") == 16  # two sites, [16, 128] of 16 ranks as two numbers each
        assert kernel.count("LDG.E.128", "loop") == 4  # B of both
    else:
        assert kernel.count("LDG.E.128", "loop") == 16 + 4 * 8  # 16 ranks of B; the ranks of 8 splits
