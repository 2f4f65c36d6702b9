"""Product with NF4 weights.

    y = x @ W.T (+ bias),   W[n, k] = code[q[n, k]] * absmax[(n * K + k) // 64]

The CPU kernel keeps double quantization compressed and computes, one float32 chain per output,

    y[m, n] = bias[n] + sum over blocks b of absmax[n, b] * (sum over the block's k of code[q[n, k]] * x[m, k])

so that a row has the same bits in every batch. The inner sums are float32 ones, or ("int16") those of integers: x
rounded to 16 bits per row and block, code to 14, their sum exact. That is twice as fast, and its error is a quarter of
what rounding x and W to TF32 makes. What a GPU computes, `triton/nf4_linear.py` says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lorry.kernels import dispatch, native, nf4
from lorry.kernels.lora import LoraTerm, lora_shrink
from lorry.kernels.nf4 import NF4Weight

if TYPE_CHECKING:
    from lorry.kernels.triton.nf4_fragments import Fragments

TILE = 16  # output columns that lie side by side in memory
NESTED_SPAN = 32  # nested groups that one tile may touch, and the padding behind the last
KINDS = {"float32": 3, "int16": 4}  # enum kind of csrc/linear.h
INT16_UNITS = range(4096, 8192)  # for the integers that stand for the codes: the more bits they have, the fewer x has

Products = Literal["float32", "int16"]


class NF4Linear:
    """The weights of one or more linears that share their input, fused along N.

    parts: NF4 weights [N_i, K] of one K; bias: [sum of N_i] or None. Each part keeps its own absmax state. Where the
    CPU kernel serves (float32 rows, blocksize 64, K % 64 == 0, every N_i % 16 == 0) codes and absmax are permuted
    once into tiles of 16 columns, where the GPU's serves (the same without the dtype) into fragments of the tensor
    cores; `parts` undoes the permutation. products: the numbers that the CPU kernel multiplies.
    """

    def __init__(self, parts: Sequence[NF4Weight], bias: Tensor | None = None, products: Products = "float32") -> None:
        if not parts:
            raise ValueError("parts must hold at least one NF4Weight")
        if len({part.shape[1] for part in parts}) != 1:
            raise ValueError(f"parts must share K, got shapes {[part.shape for part in parts]}")
        self.N = [part.shape[0] for part in parts]
        self.in_features = parts[0].shape[1]
        self.out_features = sum(self.N)
        self.nbytes = sum(part.nbytes for part in parts)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.bias = bias
        self.products = products
        self._fragments = _fragments(parts, bias)
        self.native = self._fragments is None and native.library() is not None and all(_fits(part) for part in parts)
        self._parts: list[NF4Weight] = []
        if self.native:
            self._parts = [_permuted(part) for part in parts]
            self._plan()
        elif self._fragments is None:
            self._parts = list(parts)

    def _plan(self) -> None:
        """The C struct that describes these tensors; what it points to lives as long as self."""
        self._code = self._parts[0].code.float().contiguous()
        self._code_int16, unit = int16_codes(tuple(self._code.tolist()))
        self._wide_bias = None if self.bias is None else self.bias.float().contiguous()
        self._c_parts = (native.Part * len(self._parts))(*map(_describe, self._parts))
        self._c_linear = native.Linear(
            ctypes.addressof(self._c_parts),
            len(self._parts),
            self.in_features,
            self.out_features,
            self.out_features // TILE,
            None if self._wide_bias is None else self._wide_bias.data_ptr(),
            self._code.data_ptr(),
            self._code_int16.data_ptr(),
            unit,
            KINDS[self.products],
        )
        self.plan = ctypes.addressof(self._c_linear)

    @property
    def parts(self) -> list[NF4Weight]:
        """The weights this was made of, bit for bit."""
        if self._fragments is not None:
            return self._fragments.parts
        return [_unpermuted(part) for part in self._parts] if self.native else list(self._parts)

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K), bias not counted."""
        return 8 * self.nbytes / (self.out_features * self.in_features)


def _fits(part: NF4Weight) -> bool:
    size = part.nested_blocksize
    return (
        part.packed.is_cpu
        and part.blocksize == nf4.DEFAULT_BLOCKSIZE
        and part.shape[1] % part.blocksize == 0
        and part.shape[0] % TILE == 0
        and part.shape[0] * part.shape[1] // part.blocksize < 2**31
        and size & (size - 1) == 0
        and (TILE - 1) * part.shape[1] // part.blocksize // size < NESTED_SPAN - 1
    )


def _fragments(parts: Sequence[NF4Weight], bias: Tensor | None) -> Fragments | None:
    if not dispatch.on_gpu(parts[0].packed):
        return None
    from lorry.kernels.triton.nf4_fragments import Fragments, fits

    return Fragments.on_device(parts, bias) if fits(parts) else None


@cache
def int16_codes(code: tuple[float, ...]) -> tuple[Tensor, float]:
    """round(unit * code) twice over, int16 [32], and the unit of INT16_UNITS whose greatest rounding is least."""
    exact = torch.tensor(code, dtype=torch.float64) * torch.tensor(INT16_UNITS, dtype=torch.float64)[:, None]
    error = (exact - exact.round()).abs().amax(1) / torch.tensor(INT16_UNITS)
    best = int(error.argmin())
    return exact[best].round().to(torch.int16).repeat(2), float(INT16_UNITS[best])


def _permuted(part: NF4Weight) -> NF4Weight:
    """Codes to [N/16, K/8, 16] words of eight nibbles, k = 0, 2, 4, 6, 1, 3, 5, 7 from the lowest on; absmax to
    [N/16, K/64, 16]; a pure permutation."""
    rows, columns = part.shape
    words = part.packed.view(rows // TILE, TILE, columns // 8, 4).transpose(1, 2)
    even, odd = words >> 4, words & 15
    words = torch.cat([half[..., ::2] | half[..., 1::2] << 4 for half in (even, odd)], -1)
    absmax = part.absmax.view(rows // TILE, TILE, columns // part.blocksize).transpose(1, 2)
    nested = part.nested_absmax
    if nested is not None:
        nested = torch.nn.functional.pad(nested, (0, NESTED_SPAN))[: nested.numel()]
    return replace(part, packed=words.flatten(), absmax=absmax.flatten(), nested_absmax=nested)


def _unpermuted(part: NF4Weight) -> NF4Weight:
    rows, columns = part.shape
    words = part.packed.view(rows // TILE, columns // 8, TILE, 4).transpose(1, 2)
    even, odd = (torch.stack([half & 15, half >> 4], -1).flatten(-2) for half in (words[..., :2], words[..., 2:]))
    absmax = part.absmax.view(rows // TILE, columns // part.blocksize, TILE).transpose(1, 2)
    return replace(part, packed=(even << 4 | odd).flatten(), absmax=absmax.flatten())


def _describe(part: NF4Weight) -> native.Part:
    nested = part.nested_absmax is not None and part.nested_code is not None
    absmax = part.absmax.data_ptr()
    return native.Part(
        part.packed.data_ptr(),
        absmax if nested else None,
        None if nested else absmax,
        part.nested_absmax.data_ptr() if part.nested_absmax is not None else None,
        part.nested_code.data_ptr() if part.nested_code is not None else None,
        part.nested_offset or 0.0,
        part.nested_blocksize.bit_length() - 1,
        part.shape[0] // TILE,
    )


def nf4_linear_reference(x: Tensor, parts: Sequence[NF4Weight], bias: Tensor | None = None) -> Tensor:
    """x @ dequantize(W).T (+ bias); x [M, K] -> [M, sum of N] in x's dtype."""
    weight = torch.cat([nf4.dequantize(part, x.dtype) for part in parts])
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def nf4_linear(x: Tensor, weight: NF4Linear, out: Tensor | None = None, shrink: LoraTerm | None = None) -> Tensor:
    """y = x @ W.T (+ bias).

    x: [M, K] float32, bfloat16 or float16; out: [M, N] of x's dtype to write to, or None for a new tensor.
    shrink: on a GPU, a LoRA term of the same x, whose first half this computes too, in the same launch where the plan
    has room for it; a later kernel does the second.
    On a CPU float32 rows take the kernel where the weight fits it, on a GPU 16-bit rows; all others the reference.
    """
    rows, columns = x.shape
    if columns != weight.in_features:
        raise ValueError(f"x must be [M, {weight.in_features}], got {list(x.shape)}")
    if weight._fragments is not None and x.dtype is not torch.float32:
        from lorry.kernels.triton import nf4_linear as gpu

        return gpu.nf4_linear(x, weight._fragments, out, shrink)
    if shrink is not None:
        lora_shrink(x, shrink)
    library = native.library()
    if library is None or not weight.native or x.dtype is not torch.float32 or x.stride()[1] != 1:
        y = nf4_linear_reference(x, weight.parts, weight.bias)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty(rows, weight.out_features)
    elif out.shape != (rows, weight.out_features) or out.stride()[1] != 1 or out.dtype is not torch.float32:
        raise ValueError(f"out must be float32 [{rows}, {weight.out_features}] with contiguous rows")
    status = library.linear_forward(weight.plan, x.data_ptr(), rows, x.stride()[0], out.data_ptr(), out.stride()[0])
    native.check(status)
    return out
