"""e4m3 on a GPU or in the interpreter: every code, and floats around every number and midpoint, against torch's casts;
what only a GPU runs, instruction by instruction."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.kv_store import FP8
from lorry.kernels.triton.fp8 import UNPACK_BFLOAT16, UNPACK_FLOAT16, to_e4m3, unpack_pairs


@triton.jit
def unpack_kernel(words, low, high, ONCE: tl.constexpr):
    i = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    one, other = unpack_pairs(tl.load(words + i), low.dtype.element_ty, ONCE)
    tl.store(low + i, one)
    tl.store(high + i, other)


@triton.jit
def pack_kernel(values, codes, count):
    i = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    tl.store(codes + i, to_e4m3(tl.load(values + i, mask=i < count, other=0.0)), mask=i < count)


def every_word(device: str = "cpu") -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.int16)


def same(actual: Tensor, expected: Tensor) -> bool:
    """Bit for bit but for the kinds of NaN."""
    bits = torch.int32 if actual.dtype is torch.float32 else torch.int16
    clean = [part.masked_fill(part.isnan(), 500.0).view(bits) for part in (actual, expected)]
    return torch.equal(*clean)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_code_is_unpacked(dtype: torch.dtype, once: bool, device: str) -> None:
    words = every_word(device)
    low, high = torch.empty(2, len(words), dtype=dtype, device=device)
    unpack_kernel[16,](words, low, high, ONCE=once)
    numbers = words.view(torch.uint8).view(FP8).to(dtype).view(-1, 2)
    assert numbers.isnan().sum() == 4 << 8
    assert same(low, numbers[:, 0].contiguous())
    assert same(high, numbers[:, 1].contiguous())


def test_floats_are_packed_as_torch_rounds_them(device: str) -> None:
    """All numbers and midpoints, their neighbours, all sizes of magnitude, what is too large, and what is none."""
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).float()
    numbers = numbers[~numbers.isnan()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, middles, torch.tensor([464.0, -464.0, 480.0, 0.0, -0.0])])
    nudged = [torch.nextafter(exact, torch.full_like(exact, side)) for side in (-9e9, 9e9)]
    patterns = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = torch.cat([exact, *nudged, patterns, torch.randn(1 << 16), torch.full((1,), torch.inf)])
    values = torch.cat([values, -values, torch.tensor([torch.nan])]).to(device)
    codes = torch.empty(len(values), dtype=torch.uint8, device=device)
    pack_kernel[triton.cdiv(len(values), 4096),](values, codes, len(values))
    expected = values.clamp(-448, 448).to(FP8).view(torch.uint8)
    nan = values.isnan()
    assert nan.any()
    assert torch.equal(codes[~nan], expected[~nan])
    assert torch.equal(codes[nan] & 0x7F, torch.full_like(codes[nan], 0x7F))


@pytest.mark.parametrize(("code", "dtype"), [(UNPACK_BFLOAT16, torch.bfloat16), (UNPACK_FLOAT16, torch.float16)])
def test_the_instructions(code: str, dtype: torch.dtype) -> None:
    """What the interpreter leaves out: both halves of a register, whatever is in the other."""
    words = every_word()
    neighbours = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(1))]
    register = (words.long() & 0xFFFF) | (neighbours.long() & 0xFFFF) << 16
    low, high = executed(code, register, dtype)
    for shift, half in ((0, words), (16, neighbours)):
        numbers = half.view(torch.uint8).view(FP8).to(dtype).view(-1, 2)
        for actual, expected in ((low, numbers[:, 0]), (high, numbers[:, 1])):
            assert same((actual >> shift).to(torch.int16).view(dtype), expected.contiguous())


def executed(code: str, register: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """$0 and $1 of the PTX for each value of $2; int64 with 32 bits each."""
    state = {"$2": register}

    def halves(bits: Tensor) -> list[Tensor]:
        return [(bits >> shift).to(torch.int16).view(dtype).double() for shift in (0, 16)]

    def joined(parts: list[Tensor]) -> Tensor:
        low, high = ((part.to(dtype).view(torch.int16).long() & 0xFFFF) for part in parts)
        return low | high << 16

    operations = {
        "mov.b32": lambda a: a,
        "shl.b32": lambda a, b: a << b,
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "add.u32": lambda a, b: a + b,
        "mad.lo.u32": lambda a, b, c: a * b + c,
        "mul.rn.f16x2": lambda a, b: joined([x * y for x, y in zip(halves(a), halves(b), strict=True)]),
        "fma.rn.bf16x2": lambda a, b, c: joined(
            [x * y + z for x, y, z in zip(halves(a), halves(b), halves(c), strict=True)]
        ),
    }
    for name, target, operands in re.findall(r"^\s+(?!\.)([a-z0-9.]+) ([$\w]+), (.+);$", code, re.MULTILINE):
        values = [
            state[operand] if operand in state else torch.tensor(int(operand, 0)) for operand in operands.split(", ")
        ]
        state[target] = operations[name](*values) & 0xFFFFFFFF
    return state["$0"], state["$1"]
