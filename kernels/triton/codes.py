"""Rank pages in 8 bits in kernels: their codes to numbers, the same bits on all GPUs.

    int8 codes are the numbers     uint8 codes are e4m3's: (-1)**s 2**(e - 7) (1 + m / 8), as fp8.py has them; no NaN

In two bfloat16, one fused operation: 128 + (code & 127) less 128 + (code & 128) for int8; for e4m3 the seven bits below
the sign, moved to where the exponent ends and the mantissa begins, times 2**120. All exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorry.kernels.triton.common import INTERPRET
from lorry.kernels.triton.fp8 import e4m3_value

HEADER = tl.constexpr(64)  # bytes in front of A: float32 [16], scales of the ranks

# $2: a word of four codes; $0 and $1: the numbers of the first and the last two.
INT8_TO_BFLOAT16 = """
    {
    .reg .b32 x, y, u, v, minus;
    mov.b32 minus, 0xbf80bf80;
    and.b32 v, $2, 0x80808080;
    and.b32 u, $2, 0x7f7f7f7f;
    prmt.b32 x, u, 0x43, 0x4140;
    prmt.b32 y, u, 0x43, 0x4342;
    prmt.b32 u, v, 0x43, 0x4140;
    prmt.b32 v, v, 0x43, 0x4342;
    fma.rn.bf16x2 x, u, minus, x;
    fma.rn.bf16x2 $1, v, minus, y;
    mov.b32 $0, x;
    }
"""
INT8_TO_FLOAT16 = """
    {
    .reg .b32 x, y, bias;
    mov.b32 bias, 0xe480e480;
    prmt.b32 x, $2, 0, 0x4140;
    prmt.b32 y, $2, 0, 0x4342;
    xor.b32 x, x, 0x64806480;
    xor.b32 y, y, 0x64806480;
    add.rn.f16x2 $0, x, bias;
    add.rn.f16x2 $1, y, bias;
    }
"""
E4M3_TO_BFLOAT16 = """
    {
    .reg .b32 x, y, z, power, zero;
    mov.b32 power, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    prmt.b32 x, $2, 0, 0x1404;
    prmt.b32 y, $2, 0, 0x3424;
    and.b32 z, x, 0x80008000;
    shr.u32 x, x, 4;
    and.b32 x, x, 0x07f007f0;
    or.b32 x, x, z;
    and.b32 z, y, 0x80008000;
    shr.u32 y, y, 4;
    and.b32 y, y, 0x07f007f0;
    or.b32 y, y, z;
    fma.rn.bf16x2 $0, x, power, zero;
    fma.rn.bf16x2 $1, y, power, zero;
    }
"""
E4M3_TO_FLOAT16 = """
    {
    .reg .b32 x, y, z, power;
    mov.b32 power, 0x5c005c00;
    prmt.b32 x, $2, 0, 0x1404;
    prmt.b32 y, $2, 0, 0x3424;
    and.b32 z, x, 0x80008000;
    shr.u32 x, x, 1;
    and.b32 x, x, 0x3f803f80;
    or.b32 x, x, z;
    and.b32 z, y, 0x80008000;
    shr.u32 y, y, 1;
    and.b32 y, y, 0x3f803f80;
    or.b32 y, y, z;
    mul.rn.f16x2 $0, x, power;
    mul.rn.f16x2 $1, y, power;
    }
"""
_INT8_TO_BFLOAT16, _INT8_TO_FLOAT16 = tl.constexpr(INT8_TO_BFLOAT16), tl.constexpr(INT8_TO_FLOAT16)
_E4M3_TO_BFLOAT16, _E4M3_TO_FLOAT16 = tl.constexpr(E4M3_TO_BFLOAT16), tl.constexpr(E4M3_TO_FLOAT16)


@triton.jit
def unpacked(codes, dtype: tl.constexpr):
    """int8 or uint8 codes → their numbers in bfloat16, float16 or float32, exact; other types cast to `dtype`."""
    if codes.dtype.primitive_bitwidth != 8:
        return codes.to(dtype)
    elif INTERPRET:
        if codes.dtype == tl.uint8:
            return e4m3_value(codes.to(tl.int32)).to(dtype)
        else:
            return codes.to(tl.float32).to(dtype)
    elif dtype == tl.float16:
        if codes.dtype == tl.uint8:
            return tl.inline_asm_elementwise(_E4M3_TO_FLOAT16, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(_INT8_TO_FLOAT16, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4)
    elif codes.dtype == tl.uint8:
        values = tl.inline_asm_elementwise(_E4M3_TO_BFLOAT16, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4)
        return values.to(dtype)
    else:
        values = tl.inline_asm_elementwise(_INT8_TO_BFLOAT16, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4)
        return values.to(dtype)


@triton.jit
def rank_scales(arena, offset):
    """float32 [16] of the page at `offset`."""
    return tl.load((arena + offset).to(tl.pointer_type(tl.float32)) + tl.arange(0, 16))
