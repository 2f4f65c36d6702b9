"""Paged attention on a GPU or in the interpreter: both plans, against float64; what is read; determinism; assembly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.kernels import paged_attention as public
from lorry.kernels.kv_store import FP8
from lorry.kernels.triton import paged_attention as gpu
from lorry.kernels.triton.paged_attention import Tiling

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
HUGE = 2**31 - 1
SPLIT, KEYS = 64, 32
HEADS = {"1": (2, 2, 64), "3": (6, 2, 96), "4": (4, 1, 128), "7": (7, 1, 64), "8": (8, 1, 80), "17": (17, 1, 16)}
MIXED = ((1, 19, 0, 2, 27), (97, 19, 5, 130, 59))  # rows and lengths


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, splits and chunks of splits within a few hundred tokens."""
    decode, prefill = gpu.decode_tiling, gpu.prefill_tiling

    def small_decode(group: int, width: int, wide: bool, fp8: bool) -> Tiling:
        return Tiling(decode(group, width, wide, fp8).rows, KEYS, stages=2, warps=4)

    def small_prefill(group: int, width: int, wide: bool, fp8: bool) -> Tiling:
        return Tiling(min(32 if group <= 8 else 128, prefill(group, width, wide, fp8).rows), KEYS, stages=2, warps=4)

    monkeypatch.setattr(gpu, "LEAST_SPLIT", SPLIT)
    monkeypatch.setattr(gpu, "REDUCE_SPLITS", 2)
    monkeypatch.setattr(gpu, "decode_tiling", small_decode)
    monkeypatch.setattr(gpu, "prefill_tiling", small_prefill)


def paged(
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    shape: tuple[int, int, int],
    device: str,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
) -> Batch:
    """q inside of a fused output; NaN in every slot that no row may see; unused table entries -1 or huge."""
    heads, kv_heads, width = shape
    needed = [-(-length // 16) for length in kv_lens]
    generator = torch.Generator().manual_seed(sum(kv_lens))
    fused = torch.randn(sum(q_lens), heads + 2 * kv_heads, width, generator=generator).to(dtype)
    contents = torch.randn(2, sum(needed) + 3, kv_heads, 16, width, generator=generator).to(cache_dtype or dtype)
    caches = torch.full_like(contents, float("nan"))
    order = torch.randperm(sum(needed) + 3, generator=generator).int()
    tables = torch.full((len(kv_lens), max(needed) + 2), -1, dtype=torch.int32)
    tables[::2] = HUGE
    for sequence, (blocks, rows, length) in enumerate(zip(needed, q_lens, kv_lens, strict=True)):
        first = max(0, length - max(rows, 1) - window + 1) if window else 0
        used = slice(first // 16, blocks)
        tables[sequence, used], order = order[:blocks][used], order[blocks:]
        for token in range(first, length):
            block = int(tables[sequence, token // 16])
            caches[:, block, :, token % 16] = contents[:, block, :, token % 16]
    bounds = torch.tensor((0, *q_lens)).cumsum(0).int()
    parts = fused[:, :heads], caches[0], caches[1], tables, bounds, torch.tensor(kv_lens).int()
    moved = tuple(part.to(device) for part in parts)
    return (fused.to(device)[:, :heads], *moved[1:])  # type: ignore[return-value]


def expected(batch: Batch, scale: float, window: int = 0) -> Tensor:
    """float64, one row and head at a time, from the tokens that it sees and no others."""
    q, k_cache, v_cache, tables, bounds, kv_lens = (part.cpu() for part in batch)
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        start, stop = bounds[sequence : sequence + 2].tolist()
        for row in range(start, stop):
            position = kv_len - stop + row
            n = torch.arange(max(0, position - window + 1) if window else 0, position + 1)
            keys, values = (
                cache[tables[sequence, n // 16].long(), :, n % 16].double().repeat_interleave(group, 1)
                for cache in (k_cache, v_cache)
            )
            weights = torch.einsum("hd,nhd->hn", q[row].double() * scale, keys).softmax(-1)
            out[row] = torch.einsum("hn,nhd->hd", weights, values)
    return out.to(q.device)


def compare(actual: Tensor, batch: Batch, scale: float, window: int, relative_rms: Callable[..., float]) -> None:
    reference = expected(batch, scale, window)
    rms, peak = {torch.float32: (1e-6, 5e-6), torch.float16: (5e-4, 2e-3), torch.bfloat16: (4e-3, 16e-3)}[actual.dtype]
    actual = actual.cpu().double()
    assert relative_rms(actual, reference) < rms
    assert (actual - reference).abs().max() < peak * reference.abs().max()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("window", [0, 41])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_mixed_batches(
    shape: tuple[int, int, int], window: int, device: str, relative_rms: Callable[..., float]
) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(shape[0] + window) % 3]
    batch = paged(*MIXED, shape, device, dtype, window=window)
    scale = shape[2] ** -0.5
    compare(gpu.paged_attention(*batch, scale, window), batch, scale, window, relative_rms)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("q", "cache"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_mixed_dtypes(q: str, cache: str, device: str, relative_rms: Callable[..., float]) -> None:
    batch = paged((1, 0, 9), (71, 3, 40), (3, 1, 48), device, getattr(torch, q), getattr(torch, cache))
    compare(gpu.paged_attention(*batch, 0.2), batch, 0.2, 0, relative_rms)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("window", [0, 41])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_e4m3_caches(shape: tuple[int, int, int], window: int, device: str, relative_rms: Callable[..., float]) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[(shape[0] + shape[2] // 16 + window) % 3]
    batch = paged(*MIXED, shape, device, dtype, FP8, window)
    scale = shape[2] ** -0.5
    compare(gpu.paged_attention(*batch, scale, window), batch, scale, window, relative_rms)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 160, 256])
def test_e4m3_caches_of_wide_heads(
    width: int, dtype: torch.dtype, device: str, relative_rms: Callable[..., float]
) -> None:
    batch = paged((1, 7, 1), (50, 20, 90), (2, 1, width), device, dtype, FP8)
    compare(gpu.paged_attention(*batch, 0.06), batch, 0.06, 0, relative_rms)
    # a row's bits do not depend on the others, as with other caches
    alone = (batch[0][8:], *batch[1:3], batch[3][2:], torch.tensor([0, 1], device=device).int(), batch[5][2:])
    assert torch.equal(gpu.paged_attention(*alone, 0.06), gpu.paged_attention(*batch, 0.06)[8:])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("rows", "window"), [(1, 0), (1, 33), (4, 1), (6, 0), (6, 33)])
def test_boundaries(rows: int, window: int, device: str, relative_rms: Callable[..., float]) -> None:
    """Lengths at the ends of blocks, tiles, splits and chunks of splits, 1 fewer and 1 more."""
    lengths = (15, 16, 17, 33, 63, 64, 65, 127, 129, 193)
    batch = paged((rows,) * len(lengths), lengths, (3, 1, 32), device, window=window)
    hints = {"min_query_len": rows, "max_query_len": rows} if rows != 4 else {}
    compare(gpu.paged_attention(*batch, 0.3, window, **hints), batch, 0.3, window, relative_rms)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("window", [0, 150])
def test_long_sequences_have_longer_splits(window: int, device: str, relative_rms: Callable[..., float]) -> None:
    """Three multiprocessors: at most six splits, seven with a window."""
    batch = paged((2, 1, 1), (700, 399, 385), (3, 1, 16), device, window=window)
    compare(gpu.paged_attention(*batch, 0.3, window, max_query_len=2, sms=3), batch, 0.3, window, relative_rms)


@pytest.mark.usefixtures("poison")
def test_heads_of_256(device: str, relative_rms: Callable[..., float]) -> None:
    batch = paged((1, 7), (50, 20), (2, 1, 256), device, torch.float16)
    compare(gpu.paged_attention(*batch, 0.06), batch, 0.06, 0, relative_rms)


@pytest.mark.usefixtures("poison")
def test_padding_of_a_graph(device: str, relative_rms: Callable[..., float]) -> None:
    """Sequences without rows at the end; one row of a sequence without keys is zeros."""
    batch = paged((1, 1, 0, 0), (33, 0, 0, 1), (4, 2, 32), device)
    actual = gpu.paged_attention(*batch, 0.2, max_query_len=1)
    compare(actual[:1], (batch[0][:1], *batch[1:3], batch[3][:1], batch[4][:2], batch[5][:1]), 0.2, 0, relative_rms)
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))
    nothing = paged((0, 0), (5, 0), (4, 2, 32), device)
    assert gpu.paged_attention(*nothing, 0.2).shape == (0, 4, 32)


def test_large_scores_do_not_overflow(device: str, relative_rms: Callable[..., float]) -> None:
    batch = paged((1, 9), (90, 40), (3, 1, 32), device)
    batch[0].mul_(300)
    compare(gpu.paged_attention(*batch, 1.0), batch, 1.0, 0, relative_rms)


@pytest.mark.parametrize("window", [0, 50])
def test_a_row_has_the_same_bits_in_every_batch(window: int, device: str) -> None:
    q_lens, kv_lens = (1, 2, 7, 18), (200, 90, 7, 70)
    batch = paged(q_lens, kv_lens, (5, 1, 32), device, torch.float16, window=window)
    whole = gpu.paged_attention(*batch, 0.2, window)
    for _ in range(1 if device == "cpu" else 100):
        assert torch.equal(gpu.paged_attention(*batch, 0.2, window), whole)
    q, k_cache, v_cache, tables, bounds, lengths = batch
    for sequence, rows in enumerate(q_lens):
        start, blocks = int(bounds[sequence]), -(-kv_lens[sequence] // 16)
        alone = gpu.paged_attention(
            q[start : start + rows],
            k_cache,
            v_cache,
            tables[sequence : sequence + 1, :blocks],
            torch.tensor([0, rows], dtype=torch.int32, device=device),
            lengths[sequence : sequence + 1],
            0.2,
            window,
            min_query_len=rows,
            max_query_len=rows,
        )
        assert torch.equal(alone, whole[start : start + rows]), sequence


def test_what_does_not_fit_is_refused(device: str) -> None:
    q, k_cache, v_cache, *rest = paged((1,), (5,), (2, 1, 32), device)
    e5m2 = torch.zeros(k_cache.shape, device=device).to(torch.float8_e5m2)
    for message, arguments in {
        "k_cache is torch.float8_e5m2": (q, e5m2, e5m2, *rest),
        "q is torch.float8_e4m3fn": (q.to(FP8), k_cache, v_cache, *rest),
        "one shape and dtype": (q, k_cache, v_cache.half(), *rest),
        "a multiple of 16 to 256": (q[..., :24], k_cache[..., :24], v_cache[..., :24], *rest),
        "for each of the 1 key heads": (q.repeat(1, 40, 1), k_cache, v_cache, *rest),
        "contiguous within a block": (q, k_cache.mT.contiguous().mT, v_cache, *rest),
        "kv_lens must be int32": (q, k_cache, v_cache, *rest[:2], rest[2].long()),
    }.items():
        with pytest.raises(ValueError, match=message):
            gpu.paged_attention(*arguments, 0.2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale is 0"):
        gpu.paged_attention(q, k_cache, v_cache, *rest, 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_public_function_takes_the_gpu_and_can_be_captured(relative_rms: Callable[..., float]) -> None:
    batch = paged(*MIXED, (8, 2, 128), "cuda", torch.bfloat16)
    compare(public.paged_attention(*batch, 0.1), batch, 0.1, 0, relative_rms)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = public.paged_attention(*batch, 0.1)
    batch[0].mul_(-1)
    graph.replay()
    compare(out, batch, 0.1, 0, relative_rms)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("case", "of_prefill"), [("32/8x128", 8), ("14/2x64 window", 4), ("8/4x256", 8)])
def test_assembly(case: str, of_prefill: int, architecture: int, assembled: Callable[..., list[Any]]) -> None:
    """A tile of keys and values goes to shared memory 16 bytes at a time; tensor cores multiply it; no spills.

    of_prefill: pieces of 16 bytes for each of 256 threads; in decoding it is 16 for each of 128.
    """
    decode, reduction = assembled(f"decode {case}", architecture)
    (prefill,) = assembled(f"prefill {case}", architecture)
    for kernel, pieces in ((decode, 16), (prefill, of_prefill)):
        assert kernel.count("LDGSTS.E.BYPASS.128", "loop") == pieces
        assert kernel.count("LDG.E.128") > 0  # q
        assert kernel.count("MUFU.EX2", "loop") > 0
    assert decode.count("HMMA.16816.F32.BF16", "loop") > 0
    assert prefill.count("HGMMA" if architecture >= 90 else "HMMA.16816.F32.BF16", "loop") > 0
    assert reduction.count("LDG.E.128", "loop") > 0
    assert decode.spills == prefill.spills == reduction.spills == 0


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("case", "of_decode", "of_prefill"), [("32/8x128", 16, 2), ("14/2x64 window", 8, 2), ("8/4x256", 16, 4)]
)
def test_assembly_of_e4m3(
    case: str, of_decode: int, of_prefill: int, architecture: int, assembled: Callable[..., list[Any]]
) -> None:
    """As above, the caches by 16 bytes; two numbers are unpacked at a time: each once, but the keys of small tiles on
    sm_80 by every warp that multiplies them; nothing is read or written byte by byte."""
    decode, _ = assembled(f"decode fp8 {case}", architecture)
    (prefill,) = assembled(f"prefill fp8 {case}", architecture)
    for kernel, pieces in ((decode, of_decode), (prefill, of_prefill)):
        assert kernel.count("LDGSTS.E.BYPASS.128", "loop") == pieces
        unpacked = kernel.count("HFMA2", "loop") + kernel.count("HMUL2", "loop")
        once = kernel is decode or architecture >= 90 or case != "8/4x256"
        assert unpacked == (8 * pieces if once else 12 * pieces)
        assert kernel.count("F2F.", "loop") == kernel.count("LDS.U", "loop") == kernel.count("STS.U", "loop") == 0
        assert kernel.spills == 0
    kind = "HMMA.16816.F32" if "x64" in case else "HMMA.16816.F32.BF16"
    assert decode.count(kind, "loop") > 0
    assert prefill.count("HGMMA" if architecture >= 90 else kind, "loop") > 0
