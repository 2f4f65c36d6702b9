"""Logit bias and penalties on a GPU, in place; see `lorry.kernels.sampling.penalize`.

A program is one row and walks over its lists of tokens, so it touches only the logits that change. Nothing is fused to
multiply-adds: in float32 the bits are those of the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.sampling import TokenValues

ENTRIES = 1024  # of a token list at a time


@triton.jit
def _penalized(z, count, repetition, presence, frequency):
    """float32 logits of tokens that the output holds `count` times."""
    z = tl.where(z < 0, z * repetition, tl.div_rn(z, tl.zeros_like(z) + repetition))
    return z - (tl.where(count > 0, presence, 0.0) + frequency * count)


@triton.jit
def penalize_kernel(
    logits, bias_starts, bias_ids, bias_values, count_starts, count_ids, counts,
    repetitions, presences, frequencies, lasts, stride, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program for a row: first its biases, then its penalties; lasts: int64 [R] or None."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    entry = tl.arange(0, ENTRIES)
    if bias_starts is not None:
        end = tl.load(bias_starts + row + 1)
        for start in range(tl.load(bias_starts + row), end, ENTRIES):
            mask = start + entry < end
            id = tl.load(bias_ids + start + entry, mask=mask, other=0)
            z = tl.load(logits + id, mask=mask, other=0.0).to(tl.float32)
            z += tl.load(bias_values + start + entry, mask=mask, other=0.0)
            tl.store(logits + id, z.to(logits.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # a token may be in both lists, at other threads
    if count_starts is not None:
        repetition = tl.load(repetitions + row)
        presence, frequency = tl.load(presences + row), tl.load(frequencies + row)
        listed = tl.cast(0, tl.int32)
        if lasts is not None:
            last = tl.load(lasts + row).to(tl.int32)
        end = tl.load(count_starts + row + 1)
        for start in range(tl.load(count_starts + row), end, ENTRIES):
            mask = start + entry < end
            id = tl.load(count_ids + start + entry, mask=mask, other=-1)
            count = tl.load(counts + start + entry, mask=mask, other=0.0)
            if lasts is not None:
                count += tl.where(id == last, 1.0, 0.0)
                listed = tl.maximum(listed, tl.max((id == last).to(tl.int32)))
            z = tl.load(logits + id, mask=mask, other=0.0).to(tl.float32)
            z = _penalized(z, count, repetition, presence, frequency)
            tl.store(logits + id, z.to(logits.dtype.element_ty), mask=mask)
        if lasts is not None:
            id = tl.where(listed == 0, last, -1) + tl.arange(0, 1)
            mask = id >= 0
            z = tl.load(logits + id, mask=mask, other=0.0).to(tl.float32)
            z = _penalized(z, tl.full((1,), 1.0, tl.float32), repetition, presence, frequency)
            tl.store(logits + id, z.to(logits.dtype.element_ty), mask=mask)


def penalize(
    logits: Tensor,
    bias: TokenValues | None,
    counts: TokenValues | None,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    last: Tensor | None = None,
) -> None:
    """In place, as `lorry.kernels.sampling.penalize`, and with the bits of the CPU's processors: nothing is fused."""
    if len(logits) == 0 or (bias is None and counts is None):
        return
    penalize_kernel[len(logits),](
        logits,
        *((None, None, None) if bias is None else (bias.starts, bias.token_ids, bias.values)),
        *((None, None, None) if counts is None else (counts.starts, counts.token_ids, counts.values)),
        repetition, presence, frequency, last, logits.stride(0),
        ENTRIES=ENTRIES, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
