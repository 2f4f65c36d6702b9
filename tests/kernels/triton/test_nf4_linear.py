"""nf4_linear on a GPU or in the interpreter: the layout, the decoding, every plan, its determinism, its assembly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorry.kernels import nf4
from lorry.kernels.lora import (
    SITES,
    AdapterPages,
    LoraTerm,
    Segments,
    Site,
    fill_routes,
    lora_add_reference,
    make_routes,
)
from lorry.kernels.nf4 import NF4Weight
from lorry.kernels.triton import nf4_fragments as layout
from lorry.kernels.triton import nf4_linear as gpu
from lorry.kernels.triton.lora import lora_expand, lora_shrink
from lorry.kernels.triton.nf4_fragments import Fragments
from lorry.server.model.placement import Placement

SIZES = {"one": [144], "fused": [208, 48, 16], "large": [272, 160]}
COLUMNS = 5 * 64


def weights(sizes: list[int], columns: int, device: str, double_quant: bool = True) -> list[NF4Weight]:
    torch.manual_seed(sum(sizes) + columns)
    parts, placement = [], Placement(torch.device(device))
    for place, size in enumerate(sizes):
        values = torch.randn(size, columns) * (1 + place) * 0.05
        values[0, :64] = 0  # an all-zero block
        parts.append(placement.place(nf4.quantize(values, double_quant=double_quant)))
    return parts


def expected(x: torch.Tensor, parts: list[NF4Weight], bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """float64, with the codes rounded to `dtype` as the skinny and mid plans round them."""
    rounded = [replace(part, code=part.code.to(dtype).float()) for part in parts]
    weight = torch.cat([nf4.dequantize(part, torch.float32) for part in rounded]).double()
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("lane_columns", [2, 4])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_layout_is_a_permutation(sizes: list[int], double_quant: bool, lane_columns: int) -> None:
    parts = weights(sizes, COLUMNS, "cpu", double_quant)
    fragments = Fragments(parts, None, lane_columns=lane_columns)
    assert fragments.units.numel() == sum(part.packed.numel() for part in parts)
    for part, back in zip(parts, fragments.parts, strict=True):
        assert torch.equal(part.packed, back.packed) and torch.equal(part.absmax, back.absmax)
        assert back.shape == part.shape and back.nested_offset == part.nested_offset


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_byte_permutations_give_every_code(dtype: torch.dtype) -> None:
    """`_DECODE`, instruction by instruction, over all bytes and positions in a word."""
    tables = layout.code_tables(torch.tensor(nf4.CODE), dtype)[:, 0].tolist()
    h, low = [value & 0xFFFFFFFF for value in tables[:4]], [value & 0xFFFFFFFF for value in tables[4:]]
    codes = torch.tensor(nf4.CODE).to(dtype).view(torch.int16).tolist()

    def permute(a: int, b: int, selector: int) -> int:
        source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")

    for byte in range(256):
        word = byte | (byte * 7 % 256) << 8 | (255 - byte) << 16 | (byte * 31 % 256) << 24
        m, ix = word & 0x77777777, word >> 1 & 0x44444444 | 0x32103210
        outputs = []
        for shift in (0, 16):
            hh = permute(permute(h[0], h[1], m >> shift), permute(h[2], h[3], m >> shift), ix >> shift)
            ll = permute(permute(low[0], low[1], m >> shift), permute(low[2], low[3], m >> shift), ix >> shift)
            outputs.append((permute(ll, hh, 0x7351), permute(ll, hh, 0x6240)))
        for place, value in enumerate(word.to_bytes(4, "little")):
            high, lower = outputs[place // 2]
            for register, code in ((high, value >> 4), (lower, value & 15)):
                assert register >> 16 * (place % 2) & 0xFFFF == codes[code] & 0xFFFF


@pytest.mark.parametrize("lane_columns", [2, 4])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_has_the_bits_of_the_reference(
    dtype: torch.dtype, double_quant: bool, lane_columns: int, device: str
) -> None:
    parts = weights(SIZES["fused"], COLUMNS, device, double_quant)
    actual = gpu.dequantize(Fragments(parts, None, lane_columns=lane_columns), dtype)
    assert torch.equal(actual, torch.cat([nf4.dequantize(part, dtype) for part in parts]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [1, 3, 17, 33, 64, 67])
def test_against_float64(
    rows: int, sizes: list[int], dtype: torch.dtype, device: str, relative_rms: Callable[..., float], poison: None
) -> None:
    parts = weights(sizes, COLUMNS, device, double_quant=rows != 17)
    bias = torch.randn(sum(sizes), device=device) if rows % 2 else None
    fragments = Fragments(parts, bias, lane_columns=4 if rows == 3 else 2)
    x = torch.randn(rows, COLUMNS + 24, device=device).to(dtype)[:, 8:-16]  # strided
    actual = gpu.nf4_linear(x, fragments)
    reference = expected(x, parts, bias, dtype)
    rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    assert relative_rms(actual, reference) < rounding
    assert (actual - reference).abs().max() < 8 * rounding * reference.abs().max()
    assert int(fragments.arrived.abs().sum()) == 0


def test_splits_of_k(device: str, relative_rms: Callable[..., float], poison: None) -> None:
    """Ragged splits, one of them empty, and an odd number of blocks in an iteration of two."""
    parts = weights([144], 7 * 64, device)
    x = torch.randn(5, 7 * 64, device=device).half()
    for splits in (1, 2, 3, 5):
        fragments = Fragments(parts, None)
        fragments.splits = splits
        for _ in range(2):  # the second finds the counters as the first left them
            assert relative_rms(gpu.nf4_linear(x, fragments), expected(x, parts, None, torch.float16)) < 2**-12


def test_prefill(device: str, relative_rms: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slabs; weights rounded as bitsandbytes rounds them."""
    monkeypatch.setattr(gpu, "MID_ROWS", 8)
    monkeypatch.setattr(gpu, "SKINNY_ROWS", 4)
    monkeypatch.setattr(layout, "SLAB_BYTES", 2 * COLUMNS * 128)
    parts = weights(SIZES["large"], COLUMNS, device)
    bias = torch.randn(432, device=device).half()
    fragments = Fragments(parts, bias)
    assert gpu.plan(9, fragments).name == "prefill" and len(fragments.slabs) > 2
    x = torch.randn(9, COLUMNS, device=device).half()
    weight = torch.cat([nf4.dequantize(part, torch.float16) for part in parts]).double()
    assert relative_rms(gpu.nf4_linear(x, fragments), x.double() @ weight.T + bias.double()) < 2**-10


@pytest.mark.parametrize("rows", [5, 40, 70])
def test_lora_shrink_rides_along(
    rows: int, device: str, relative_rms: Callable[..., float], poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same workspace as the stand-alone shrink, in every plan, and a product that does not notice."""
    sizes, sites = SIZES["fused"], (Site(0, 0, 208), Site(1, 208, 48), Site(2, 256, 16))
    parts = weights(sizes, COLUMNS, device)
    fragments = Fragments(parts, None)
    lengths = [16 * COLUMNS + 16 * size for size in sizes]
    arena = torch.randn(2 * sum(lengths), device=device).half() * 0.1
    offsets = torch.full((2, 1, len(SITES), 2), -1, dtype=torch.int64, device=device)
    for slot in range(2):
        for site in range(3):
            offsets[slot, 0, site, 0] = slot * sum(lengths) + sum(lengths[:site])
    pages = AdapterPages(arena, offsets, torch.full((2, 1, len(SITES)), 0.5, device=device))
    starts = torch.tensor([0, 2, 2, rows - 1], dtype=torch.int32, device=device)
    slots = torch.tensor([[1], [0], [0]], dtype=torch.int32, device=device)
    segments = Segments(starts, slots, torch.ones(3, 1, device=device))
    routes = make_routes(rows, 3, 2, pages, [(COLUMNS, 3)])
    fill_routes(routes, segments, pages, rows)
    term = LoraTerm(routes, pages, 0, sites, COLUMNS)
    x = torch.randn(rows, COLUMNS, device=device).half()
    alone = gpu.nf4_linear(x, fragments)
    expected_y = expected(x, parts, None, torch.float16)
    lora_add_reference(expected_y, x, pages, 0, sites, segments)
    for most in (64, 1):  # skinny or mid; prefill
        monkeypatch.setattr(gpu, "SKINNY_ROWS", most)
        monkeypatch.setattr(gpu, "MID_ROWS", most * 8)
        routes.partial.fill_(torch.nan)
        y = gpu.nf4_linear(x, fragments, shrink=term)
        assert most == 1 or torch.equal(y, alone)
        fused = routes.partial.clone()
        lora_shrink(x, term)
        assert torch.equal(fused.nan_to_num(), routes.partial.nan_to_num())
        lora_expand(y, term)
        assert relative_rms(y, expected_y) < 2**-10


def test_tiles_and_slabs_cover_every_row_once() -> None:
    for sizes in ([16], [128], [4096, 1024, 1024], [576, 192, 192], [14336, 14336], [208, 48, 16]):
        tiles = layout._tiles(sizes)
        ends = [sum(sizes[: part + 1]) for part in range(len(sizes))]
        covered = [row for first, part in tiles for row in range(first, min(first + 128, ends[part]))]
        assert covered == list(range(sum(sizes)))
        slabs = layout._slabs(tiles, sum(sizes), 4096)
        assert [row for _, _, start, end in slabs for row in range(start, end)] == list(range(sum(sizes)))
        assert sum(count for _, count, _, _ in slabs) == len(tiles)
        assert all(end - start <= layout.SLAB_BYTES // 8192 for _, _, start, end in slabs)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="K % 64 == 0"):
        Fragments(weights([16], 96, "cpu"), None)
    with pytest.raises(ValueError, match="N % 16 == 0"):
        Fragments(weights([24], 128, "cpu"), None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter's sums have another order")
def test_a_row_has_the_same_bits_in_every_batch() -> None:
    parts = weights([2048], 4096, "cuda")
    fragments = Fragments(parts, None)
    x = torch.randn(1024, 4096, device="cuda").bfloat16()
    for group in ((1, 2, 15, 16, 33, 64), (65, 100, 512)):
        first = gpu.nf4_linear(x[: group[0]], fragments)
        for rows in group:
            for _ in range(100 if rows < 64 else 5):
                assert torch.equal(gpu.nf4_linear(x[:rows], fragments)[: group[0]], first)


@pytest.mark.parametrize("architecture", [80, 90])
def test_assembly_of_the_others(architecture: int, assembled: Callable[..., list[Any]]) -> None:
    (kernel,) = assembled("dequantize", architecture)
    assert kernel.spills == kernel.count("FFMA") == 0  # fused, absmax would have other bits than the checkpoint's
    lanes = 2 if architecture >= 90 else 4
    for case in ("gate_up M=512", "shrink M=16", "shrink M=64"):
        (kernel,) = assembled(f"{case} lanes={lanes}", architecture)
        assert kernel.spills <= (32 if case == "shrink M=64" and architecture == 90 else 0)
        assert kernel.count("LDL", "loop") == kernel.count("STL", "loop") == 0


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", ["gate_up M=16", "down M=16", "gate_up M=64"])
def test_assembly_of_the_skinny_plan(case: str, architecture: int, assembled: Callable[..., list[Any]]) -> None:
    """Two byte permutations for each weight, no more; loads of 16 bytes; decoded weights never in shared memory."""
    lanes = 2 if architecture >= 90 else 4
    (kernel,) = assembled(f"{case} lanes={lanes}", architecture)
    weights_of_a_thread = 128 * 64 * 2 // (128 if case.endswith("16") else 256)
    assert kernel.count("PRMT", "loop") <= 2.2 * weights_of_a_thread
    assert kernel.count("LDGSTS.E.BYPASS.128", "loop") >= weights_of_a_thread // 32
    assert kernel.count("STS", "loop") <= 2 and kernel.count("SHFL", "loop") == 0  # two: absmax codes
    assert kernel.spills == 0
    assert kernel.count("HGMMA" if architecture >= 90 else "HMMA.16816.F32.BF16", "loop") > 0
    assert sum(kernel.loop.values()) < (5.7 if case.endswith("16") else 10) * weights_of_a_thread
