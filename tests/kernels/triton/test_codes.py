"""Codes of 8 bits on a GPU or in the interpreter: every one as its number; what only a GPU runs, instruction by
instruction."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.triton.codes import (
    E4M3_TO_BFLOAT16,
    E4M3_TO_FLOAT16,
    INT8_TO_BFLOAT16,
    INT8_TO_FLOAT16,
    unpacked,
)

INSTRUCTIONS = [
    (INT8_TO_BFLOAT16, torch.int8, torch.bfloat16),
    (INT8_TO_FLOAT16, torch.int8, torch.float16),
    (E4M3_TO_BFLOAT16, torch.float8_e4m3fn, torch.bfloat16),
    (E4M3_TO_FLOAT16, torch.float8_e4m3fn, torch.float16),
]


@triton.jit
def widen_kernel(out, codes):
    at = tl.arange(0, 256)
    tl.store(out + at, unpacked(tl.load(codes + at), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_code_is_its_number(dtype: torch.dtype, device: str) -> None:
    """All but the NaNs of e4m3, which no page holds."""
    codes = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    for own, expected in ((codes.view(torch.int8), codes.view(torch.int8)), (codes, codes.view(torch.float8_e4m3fn))):
        out = torch.empty(256, dtype=dtype, device=device)
        widen_kernel[1,](out, own)
        used = ~expected.float().isnan()
        assert torch.equal(out.float()[used], expected.float()[used])


@pytest.mark.parametrize(("code", "codes", "dtype"), INSTRUCTIONS)
def test_the_instructions(code: str, codes: torch.dtype, dtype: torch.dtype) -> None:
    """What the interpreter leaves out: the four of a register, whatever the others are."""
    generator = torch.Generator().manual_seed(1)
    four = torch.stack([torch.randperm(256, generator=generator) for _ in range(4)], dim=1)
    expected = four.to(torch.uint8).view(codes).float()
    pairs = executed(code, (four << torch.tensor([0, 8, 16, 24])).sum(1), dtype)
    actual = torch.cat([(pair[:, None] >> torch.tensor([0, 16])).to(torch.int16).view(dtype) for pair in pairs], dim=1)
    used = ~expected.isnan()
    assert used.sum() >= 4 * 254
    assert torch.equal(actual.float()[used], expected[used])


def executed(code: str, register: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """$0 and $1 of the PTX for each value of $2; int64 with 32 bits each."""
    state = {"$2": register}

    def halves(bits: Tensor) -> list[Tensor]:
        return [(bits >> shift).to(torch.int16).view(dtype).double() for shift in (0, 16)]

    def joined(parts: list[Tensor]) -> Tensor:
        low, high = ((part.to(dtype).view(torch.int16).long() & 0xFFFF) for part in parts)
        return low | high << 16

    def chosen(a: Tensor, b: Tensor, places: Tensor) -> Tensor:
        both, places = a | b << 32, int(places)
        return sum((both >> 8 * (places >> 4 * at & 7) & 0xFF) << 8 * at for at in range(4))

    operations = {
        "mov.b32": lambda a: a,
        "prmt.b32": chosen,
        "shr.u32": lambda a, b: a >> b,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "xor.b32": lambda a, b: a ^ b,
        "mul.rn.f16x2": lambda a, b: joined([x * y for x, y in zip(halves(a), halves(b), strict=True)]),
        "add.rn.f16x2": lambda a, b: joined([x + y for x, y in zip(halves(a), halves(b), strict=True)]),
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
