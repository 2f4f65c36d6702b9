from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorry.kernels.kv_store import CACHE_DTYPES, FP8, empty_caches
from lorry.kernels.paged_attention import paged_attention, paged_attention_reference

Measure = Callable[[Tensor, Tensor], float]
pytestmark = pytest.mark.usefixtures("kernels")
Q_LENS = (1, 5, 0, 1, 70, 1, 33, 1)
KV_LENS = (1, 5, 3, 300, 70, 64, 700, 257)


def paged_batch(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A shuffled block table; slots behind a sequence's last token hold NaN, unused table entries -1."""
    blocks = [-(-length // 16) for length in kv_lens]
    k_cache, v_cache = empty_caches(sum(blocks) + 3, kv_heads, 16, width, dtype)
    k_cache.copy_(torch.randn(k_cache.shape))
    v_cache.copy_(torch.randn(v_cache.shape))
    shuffled = torch.randperm(sum(blocks) + 3).int()
    tables = torch.full((len(kv_lens), max(blocks) + 2), -1, dtype=torch.int32)
    for sequence, (count, length) in enumerate(zip(blocks, kv_lens, strict=True)):
        tables[sequence, :count], shuffled = shuffled[:count], shuffled[count:]
        if length % 16:
            k_cache[tables[sequence, count - 1].long(), :, length % 16 :] = float("nan")
            v_cache[tables[sequence, count - 1].long(), :, length % 16 :] = float("nan")
    bounds = torch.tensor((0, *q_lens)).cumsum(0).int()
    q = torch.randn(sum(q_lens), heads, width)
    return q, k_cache, v_cache, tables, bounds, torch.tensor(kv_lens).int()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("window", [0, 1, 17, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 80), (7, 1, 16), (50, 1, 128)])
def test_equals_the_reference(heads: int, kv_heads: int, width: int, window: int, relative_rms: Measure) -> None:
    dtype = CACHE_DTYPES[(heads + window) % 4]
    batch = paged_batch(Q_LENS, KV_LENS, heads, kv_heads, width, dtype)
    expected = paged_attention_reference(*batch, width**-0.5, window)
    assert relative_rms(paged_attention(*batch, width**-0.5, window), expected) < 1e-6


@pytest.mark.parametrize("q_len", [1, 9])
def test_every_e4m3_number_is_read(q_len: int) -> None:
    """Each of them is the value of a token that its row alone sees, NaN where no other row is computed with it."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes = (codes if q_len == 1 else codes.where(codes % 128 != 127, 0)).view(FP8)
    k_cache, v_cache = empty_caches(16, 1, 16, 16, FP8)
    v_cache.copy_(codes.view(16, 1, 16, 1).expand(-1, -1, -1, 16))
    tables = torch.arange(16).int().expand(256 // q_len, -1).contiguous()
    lengths = torch.arange(q_len, 257, q_len)[: 256 // q_len].int()
    bounds = torch.arange(len(lengths) + 1).int() * q_len
    out = paged_attention(torch.ones(len(lengths) * q_len, 1, 16), k_cache, v_cache, tables, bounds, lengths, 1.0, 1)
    expected = codes.float()[: len(out)].view(-1, 1, 1).expand(-1, 1, 16)
    assert torch.equal(out.nan_to_num(500.0), expected.nan_to_num(500.0))


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 255, 256, 257])
def test_block_panel_and_chunk_boundaries(length: int, relative_rms: Measure) -> None:
    for q_len in {1, 2, length}:
        batch = paged_batch((q_len,), (length,), 5, 1, 48, torch.float32)
        expected = paged_attention_reference(*batch, 0.2)
        assert relative_rms(paged_attention(*batch, 0.2), expected) < 1e-6


@pytest.mark.parametrize("window", [0, 77])
def test_a_row_has_the_same_bits_in_prefill_chunks_and_decode(window: int) -> None:
    length = 613
    q, k_cache, v_cache, tables, _, _ = paged_batch((length,), (length,), 9, 3, 64, torch.bfloat16)

    def attend(first: int, last: int) -> Tensor:
        bounds, kv_len = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        return paged_attention(q[first:last], k_cache, v_cache, tables, bounds, kv_len, 0.125, window)

    whole = attend(0, length)
    for first, last in ((0, 1), (15, 16), (63, 65), (64, 65), (255, 256), (256, 400), (400, 613), (612, 613)):
        assert torch.equal(attend(first, last), whole[first:last]), (first, last)


def test_blocks_that_slid_out_of_the_window_are_not_read() -> None:
    batch = paged_batch((1, 7), (200, 150), 4, 2, 32, torch.float32)
    before = paged_attention(*batch, 0.2, 40)
    batch[3][0, : (200 - 40) // 16] = -1
    batch[3][1, : (150 - 7 - 39) // 16] = -1
    assert torch.equal(paged_attention(*batch, 0.2, 40), before)


def test_strided_queries_and_determinism() -> None:
    batch = paged_batch(Q_LENS, KV_LENS, 6, 2, 32, torch.bfloat16)
    fused = torch.randn(sum(Q_LENS), 10 * 32)
    fused[:, : 6 * 32] = batch[0].flatten(1)
    view = fused[:, : 6 * 32].view(-1, 6, 32)
    first = paged_attention(*batch, 0.2)
    for _ in range(20):
        assert torch.equal(paged_attention(view, *batch[1:], 0.2), first)


def test_other_shapes_take_the_reference() -> None:
    batch = paged_batch((3,), (21,), 3, 1, 20, torch.float32)
    clean = (batch[0], batch[1].nan_to_num(), batch[2].nan_to_num(), *batch[3:])
    assert torch.equal(paged_attention(*clean, 0.2), paged_attention_reference(*clean, 0.2))
    batch = paged_batch((3,), (21,), 3, 1, 32, torch.float32)
    clean = (batch[0], batch[1].nan_to_num().contiguous(), batch[2].nan_to_num(), *batch[3:])
    assert torch.equal(paged_attention(*clean, 0.2), paged_attention_reference(*clean, 0.2))


def test_large_scores_do_not_overflow(relative_rms: Measure) -> None:
    batch = paged_batch((9,), (90,), 3, 1, 32, torch.float32)
    batch[0].mul_(300)
    assert relative_rms(paged_attention(*batch, 1.0), paged_attention_reference(*batch, 1.0)) < 1e-5
