"""qkv_finish, rope and kv_store on a GPU or in the interpreter: against the separate references, and their assembly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.kernels.kv_store import CACHE_DTYPES, FP8, as_bits, empty_caches, kv_store_reference, qkv_finish_reference
from lorry.kernels.kv_store import qkv_finish as public
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
from lorry.kernels.rope import rope_reference
from lorry.kernels.triton import kv_store as gpu
from lorry.kernels.triton.lora import lora_shrink

Measure = Callable[[Tensor, Tensor], float]
BLOCKS, POSITIONS = 5, 97
# The same roundings in the same places: what differs are last bits of float32 before one of them.
CLOSE = {torch.float32: 1e-6, torch.float16: 3e-5, torch.bfloat16: 2e-4}


def inputs(rows: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """qkv inside of a wider tensor; slots without repetition, some of them -1."""
    columns = (heads + 2 * kv_heads) * width
    slots = torch.randperm(BLOCKS * 16)[:rows]
    slots[1::7] = -1
    parts = {
        "qkv": torch.randn(rows, columns + 16).to(dtype)[:, 8:-8],
        "positions": torch.randint(0, POSITIONS, (rows,)),
        "cos_sin": torch.randn(POSITIONS, width),
        "slot_mapping": slots,
    }
    return {name: part.to(device) for name, part in parts.items()}


def caches(kv_heads: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Keys and values of one arena: blocks are further apart than a block is long."""
    arena = torch.full((BLOCKS, 2, kv_heads, 16, width), 7.0, dtype=dtype, device=device)
    return arena[:, 0], arena[:, 1]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "width"),
    [(1, 3, 1, 64), (17, 5, 2, 80), (35, 2, 1, 96), (16, 4, 1, 128), (3, 2, 1, 24)],
)
def test_qkv_finish(
    rows: int, heads: int, kv_heads: int, width: int, norm: bool, device: str, relative_rms: Measure
) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(rows + norm) % 3]
    given = inputs(rows, heads, kv_heads, width, dtype, device)
    weights = {"q_norm": torch.randn(width), "k_norm": torch.randn(width)} if norm else {}
    weights = {name: weight.to(dtype).to(device) for name, weight in weights.items()}
    cache_dtype = torch.float32 if rows == 35 else dtype
    actual, expected = (caches(kv_heads, width, cache_dtype, device) for _ in range(2))
    before = given["qkv"].clone()
    reference = qkv_finish_reference(
        before, given["positions"], given["cos_sin"], *expected, given["slot_mapping"], **weights, eps=1e-5
    )
    qkv = given["qkv"]
    untouched = qkv[:, heads * width :].clone()
    q = gpu.qkv_finish(qkv, given["positions"], given["cos_sin"], *actual, given["slot_mapping"], **weights, eps=1e-5)
    assert q.data_ptr() == qkv.data_ptr()
    assert q.shape == (rows, heads, width)
    assert torch.equal(qkv[:, heads * width :], untouched)
    assert relative_rms(q, reference) < CLOSE[dtype]
    assert relative_rms(actual[0], expected[0]) < CLOSE[dtype]
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[0] == 7, expected[0] == 7)


def test_a_row_has_the_same_bits_in_every_batch(device: str) -> None:
    given = inputs(35, 3, 1, 80, torch.float16, device)
    norms = {"q_norm": torch.randn(80, device=device).half(), "k_norm": torch.randn(80, device=device).half()}
    qkv, results = given.pop("qkv"), []
    for first, last in ((0, 35), (16, 19), (18, 19)):
        keys, values = caches(1, 80, torch.float16, device)
        part = {name: table if name == "cos_sin" else table[first:last] for name, table in given.items()}
        q = gpu.qkv_finish(qkv[first:last].clone(), **part, k_cache=keys, v_cache=values, **norms)
        slot = int(given["slot_mapping"][18])
        results.append((q[18 - first], keys[slot // 16, :, slot % 16], values[slot // 16, :, slot % 16]))
    assert int(given["slot_mapping"][18]) >= 0
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("rows", "tile_rows", "dtype"), [(1, 16, torch.bfloat16), (21, 16, torch.float32), (21, 64, torch.bfloat16)]
)
def test_lora_is_added_first(rows: int, tile_rows: int, dtype: torch.dtype, device: str, relative_rms: Measure) -> None:
    """Rows of no adapter, of one, of a mix of two with three pages, of an empty segment, and of none again."""
    heads, kv_heads, width, k = 5, 2, 48, 40
    sizes = (heads * width, kv_heads * width, kv_heads * width)
    starts = [0, 0, 0, 0, 1] if rows == 1 else [3, 5, 5, 17, 17]
    segments = Segments(
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor([[0, -1], [1, -1], [1, 0], [0, 1]], dtype=torch.int32, device=device),
        torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.7, -0.4], [0.5, 0.5]], device=device),
    )
    offsets, end = torch.full((2, 1, len(SITES), 2), -1, dtype=torch.int64), 0
    for slot, site, page in ((0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 0, 1), (1, 2, 0)):  # none of 1 for k_proj
        offsets[slot, 0, site, page] = end
        end += 16 * (k + sizes[site])
    arena = (torch.randn(end) / 8).to(dtype)
    pages = AdapterPages(arena.to(device), offsets.to(device), torch.rand(2, 1, len(SITES)).to(device) + 0.5)
    bounds = (0, sizes[0], sizes[0] + sizes[1])
    sites = tuple(Site(index, start, size) for index, (start, size) in enumerate(zip(bounds, sizes, strict=True)))
    x = torch.randn(rows, k, device=device).to(dtype)
    routes = replace(make_routes(rows + 3, 6, 4, pages, [(k, 3)]), tile_rows=tile_rows)
    fill_routes(routes, segments, pages, rows)
    lora_shrink(x, term := LoraTerm(routes, pages, 0, sites, k))

    given = inputs(rows, heads, kv_heads, width, dtype, device)
    given["slot_mapping"] = torch.arange(rows, device=device) * 3
    norms = {"q_norm": torch.randn(width, device=device), "k_norm": torch.randn(width, device=device)}
    qkv = given.pop("qkv")
    total = torch.zeros(qkv.shape, dtype=torch.float64, device=device)
    lora_add_reference(total, x, pages, 0, sites, segments)
    assert total.abs().max() > 0.5
    summed = (qkv.double() + total).to(dtype)
    actual, expected = (caches(kv_heads, width, dtype, device) for _ in range(2))
    reference = qkv_finish_reference(summed, **given, k_cache=expected[0], v_cache=expected[1], **norms)
    q = gpu.qkv_finish(qkv, **given, k_cache=actual[0], v_cache=actual[1], **norms, lora=term)
    # bfloat16: sums near the middle of two numbers round either way
    tolerance = 2e-6 if dtype is torch.float32 else 1e-3
    for one, other in zip((q, *actual), (reference, *expected), strict=True):
        assert relative_rms(one, other) < tolerance


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (19, 36), (33, 128)])
def test_rope_alone(rows: int, width: int, device: str, relative_rms: Measure) -> None:
    given = inputs(rows, 5, 2, width, torch.float32, device)
    heads = given["qkv"].unflatten(1, (-1, width))
    q, k, rest = heads[:, :5], heads[:, 5:7], heads[:, 7:].clone()
    given["positions"][0] = POSITIONS  # outside
    expected = [rope_reference(x[1:], given["positions"][1:], given["cos_sin"]) for x in (q, k)]
    gpu.rope(q, k, given["positions"], given["cos_sin"])
    assert not q[0].any()
    assert not k[0].any()
    if rows > 1:
        assert relative_rms(q[1:], expected[0]) < 1e-6
        assert relative_rms(k[1:], expected[1]) < 1e-6
    assert torch.equal(heads[:, 7:], rest)


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (35, 96), (3, 256)])
def test_qkv_finish_in_e4m3(rows: int, width: int, device: str) -> None:
    """As in q's dtype, then rounded once more."""
    dtype = torch.bfloat16
    given = inputs(rows, 2, 1, width, dtype, device)
    qkv, actual, wide = given.pop("qkv"), caches(1, width, FP8, device), caches(1, width, dtype, device)
    q = gpu.qkv_finish(qkv.clone(), **given, k_cache=actual[0], v_cache=actual[1])
    assert torch.equal(gpu.qkv_finish(qkv, **given, k_cache=wide[0], v_cache=wide[1]), q)
    for one, other in zip(actual, wide, strict=True):
        assert torch.equal(as_bits(one), as_bits(other.to(FP8)))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_kv_store_alone(dtype: torch.dtype, device: str) -> None:
    given = inputs(19, 3, 3, 40, torch.float32, device)
    heads = given["qkv"].unflatten(1, (-1, 40))
    k, v, slots = heads[:, 3:6], heads[:, 6:], given["slot_mapping"]
    k[2, 0, 0], k[3, 0, 0], k[4, 0, 0] = 1e-6, 7e4, float("nan")
    k[5, 0, 0], k[6, 0, 0] = float("-inf"), 460.0
    actual, expected = (caches(3, 40, dtype, device) for _ in range(2))
    kv_store_reference(k, v, *expected, slots)
    slots[slots == -1] = BLOCKS * 16  # outside as well
    gpu.kv_store(k, v, *actual, slots)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.float().nan_to_num(9.0), other.float().nan_to_num(9.0))


def test_no_rows_and_what_does_not_fit(device: str) -> None:
    given = inputs(3, 3, 1, 32, torch.float16, device)
    qkv, table = given.pop("qkv"), given.pop("cos_sin")
    keys, values = caches(1, 32, torch.float16, device)
    empty = {name: part[:0] for name, part in given.items()}
    assert gpu.qkv_finish(qkv[:0], **empty, cos_sin=table, k_cache=keys, v_cache=values).shape == (0, 3, 32)
    assert (keys == 7).all()
    with pytest.raises(ValueError, match="its columns must be"):
        gpu.qkv_finish(qkv[:, :-8], **given, cos_sin=table, k_cache=keys, v_cache=values)
    e5m2 = keys.to(torch.float8_e5m2)
    with pytest.raises(ValueError, match=r"float8_e4m3fn, not torch\.float8_e5m2"):
        gpu.qkv_finish(qkv, **given, cos_sin=table, k_cache=e5m2, v_cache=e5m2)
    with pytest.raises(ValueError, match="given together"):
        gpu.qkv_finish(qkv, **given, cos_sin=table, k_cache=keys, v_cache=values, q_norm=table[0])
    with pytest.raises(ValueError, match="cos_sin must be float32"):
        gpu.qkv_finish(qkv, **given, cos_sin=table.half(), k_cache=keys, v_cache=values)


@pytest.mark.parametrize("norm", [False, True])
def test_the_public_function_on_a_cpu(norm: bool, relative_rms: Measure) -> None:
    given = inputs(9, 3, 2, 32, torch.float32, "cpu")
    given["slot_mapping"] = torch.arange(9)
    norms = {"q_norm": torch.randn(32), "k_norm": torch.randn(32)} if norm else {}
    qkv = given.pop("qkv")
    actual, expected = (empty_caches(BLOCKS, 2, 16, 32, torch.float32) for _ in range(2))
    reference = qkv_finish_reference(qkv.clone(), **given, k_cache=expected[0], v_cache=expected[1], **norms)
    q = public(qkv, **given, k_cache=actual[0], v_cache=actual[1], **norms)
    for one, other in zip((q, *actual), (reference, *expected), strict=True):
        assert relative_rms(one, other) < 1e-6


@pytest.mark.parametrize("architecture", [80, 90])
def test_assembly(architecture: int, assembled: Callable[..., list[Any]]) -> None:
    """A half of a head in one load of 16 bytes a thread; LoRA by tensor cores; no spills."""
    for case in ("qkv_finish", "qkv_finish norm", "qkv_finish lora", "qkv_finish fp8"):
        (kernel,) = assembled(case, architecture)
        assert kernel.count("LDG.E.128") >= 2
        assert kernel.count("STG.E.128") >= 2
        assert kernel.count("STG.E.U8") == kernel.count("STG.E.U16") == 0
        assert (kernel.count("STG.E.64") >= 2) == ("fp8" in case)  # the same numbers in half the bytes
        assert kernel.spills == 0
        assert (kernel.count("HMMA.16816.F32.BF16") > 0) == ("lora" in case)
