"""e4m3 numbers in kernels, without the instructions for them that only some GPUs have: the same bits on all.

    s eeee mmm   =   (-1)**s 2**(e - 7) (1 + m / 8),   e = 0: (-1)**s 2**-6 m / 8,   0x7f and 0xff: NaN

The largest number is 448; there is no infinity. The seven bits below the sign, moved to where the exponent of a wider
type ends and its mantissa begins, are the number times 2**(7 - bias), subnormal ones included; a product with the
inverse is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorry.kernels.triton.common import INTERPRET

# $2: two words of two codes each; $0: what the low codes are, 16 bits each, $1: the high codes. x: magnitudes in place;
# y: a bit beyond them that only a NaN's carry reaches, from which its exponent becomes ones; z: signs.
UNPACK_BFLOAT16 = """
    {
    .reg .b32 x, y, z, low, inverse, zero;
    mov.b32 inverse, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    shl.b32 x, $2, 4;
    and.b32 x, x, 0x07f007f0;
    add.u32 y, x, 0x00100010;
    and.b32 y, y, 0x08000800;
    mad.lo.u32 y, y, 15, x;
    shl.b32 z, $2, 8;
    and.b32 z, z, 0x80008000;
    or.b32 y, y, z;
    fma.rn.bf16x2 low, y, inverse, zero;
    shr.u32 x, $2, 4;
    and.b32 x, x, 0x07f007f0;
    add.u32 y, x, 0x00100010;
    and.b32 y, y, 0x08000800;
    mad.lo.u32 y, y, 15, x;
    and.b32 z, $2, 0x80008000;
    or.b32 y, y, z;
    fma.rn.bf16x2 $1, y, inverse, zero;
    mov.b32 $0, low;
    }
"""
UNPACK_FLOAT16 = """
    {
    .reg .b32 x, y, z, low, inverse;
    mov.b32 inverse, 0x5c005c00;
    shl.b32 x, $2, 7;
    and.b32 x, x, 0x3f803f80;
    add.u32 y, x, 0x00800080;
    and.b32 y, y, 0x40004000;
    or.b32 y, y, x;
    shl.b32 z, $2, 8;
    and.b32 z, z, 0x80008000;
    or.b32 y, y, z;
    mul.rn.f16x2 low, y, inverse;
    shr.u32 x, $2, 1;
    and.b32 x, x, 0x3f803f80;
    add.u32 y, x, 0x00800080;
    and.b32 y, y, 0x40004000;
    or.b32 y, y, x;
    and.b32 z, $2, 0x80008000;
    or.b32 y, y, z;
    mul.rn.f16x2 $1, y, inverse;
    mov.b32 $0, low;
    }
"""
_UNPACK_BFLOAT16, _UNPACK_FLOAT16 = tl.constexpr(UNPACK_BFLOAT16), tl.constexpr(UNPACK_FLOAT16)


@triton.jit
def unpack_pairs(words, dtype: tl.constexpr, ONCE: tl.constexpr):
    """int16 [..] of two e4m3 numbers each → the low bytes' and the high bytes' numbers in `dtype`, [..] each, exact.

    ONCE: a number is unpacked where it was loaded, once; an operand of a product then passes through shared memory to
    the warps that need it. Otherwise each of these unpacks it for itself, in the registers it is multiplied from.
    """
    if INTERPRET:
        bits = words.to(tl.int32)
        return e4m3_value(bits & 0xFF).to(dtype), e4m3_value((bits >> 8) & 0xFF).to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _UNPACK_BFLOAT16, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=not ONCE, pack=2
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _UNPACK_FLOAT16, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=not ONCE, pack=2
        )
        return low.to(dtype), high.to(dtype)


@triton.jit
def e4m3_value(code):
    """int32 codes → float32, exact; `unpack_pairs` is quicker on a GPU."""
    magnitude = code & 0x7F
    value = ((code & 0x80) << 24 | magnitude << 20).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def to_e4m3(values):
    """float32 → uint8 codes: to nearest, ties to even; what lies beyond ±448, infinities too, becomes ±448."""
    bits = values.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    bounded = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((bounded + 0x7FFFF + ((bounded >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2**-6 numbers are 2**-9 apart, as they are above 2**14
    subnormal = (bounded.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(bounded < 0x3C800000, subnormal, normal)
    return (sign | tl.where(magnitude > 0x7F800000, 0x7F, code)).to(tl.uint8)
