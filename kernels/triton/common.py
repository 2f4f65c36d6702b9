"""What the Triton kernels share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which knows no inline assembly and computes bfloat16 wrongly."""

FUSION = {"enable_fp_fusion": True}
"""Launch option, since its default differs between Triton's versions; kernels with the bits of a CPU say False."""

DEFAULT_SMS = 132  # multiprocessors for which work is cut where there is no GPU


@lru_cache  # the question takes longer than a launch
def multiprocessors(device: torch.device) -> int:
    """Of `device`, DEFAULT_SMS for one that is no GPU."""
    if device.type != "cuda":
        return DEFAULT_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b; a [..., M, K], b [..., K, N], acc float32 [..., M, N]; float32 operands are not rounded to TF32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values to the nearest of `dtype`, ties to even; the interpreter's own cast to bfloat16 cuts off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(dtype)
