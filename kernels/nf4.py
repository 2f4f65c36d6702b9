"""NF4: four-bit NormalFloat weights in the bitsandbytes format, bit for bit.

    quantize      q[i] = #{t : threshold[t] < x[i] / absmax[i // blocksize]}
    dequantize    w[i] = round_to_dtype(code[q[i]] * absmax[i // blocksize])
    absmax        absmax[b] = nested_code[u8[b]] * nested_absmax[b // 256] + nested_offset   (double quantization)

`i` runs over the row-major flat weight, so blocks cross rows where K is no multiple of the blocksize. Byte j of
`packed` holds element 2j in its high nibble and 2j + 1 in its low one. All products are float32.

Source: QLoRA (arXiv:2305.14314), the 8-bit dynamic map of arXiv:2110.02861, and bitsandbytes' CPU results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lorry.kernels import native

CODE: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_ABSMAX = 1e-38
_CHUNK_ELEMENTS = 1 << 22
_GRID_POINTS = 65536


def _code_tensor() -> Tensor:
    return torch.tensor(CODE, dtype=torch.float32)


@dataclass(frozen=True)
class NF4Weight:
    """One quantized linear weight of logical shape [N, K], exactly as a bitsandbytes checkpoint stores it.

    packed: uint8 [(N*K + 1) // 2]; absmax: uint8 [blocks] when double-quantized, else float32 [blocks];
    nested_absmax: float32 [ceil(blocks / 256)], nested_code: float32 [256] and nested_offset belong to double
    quantization and are None without it; dtype is what bitsandbytes dequantizes to; code: float32 [16].
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: float | None = None
    nested_blocksize: int = NESTED_BLOCKSIZE
    dtype: torch.dtype = torch.float32
    code: Tensor = field(default_factory=_code_tensor)

    def __post_init__(self) -> None:
        elements = self.shape[0] * self.shape[1]
        blocks = -(-elements // self.blocksize)
        if self.packed.dtype != torch.uint8 or self.packed.shape != ((elements + 1) // 2,):
            raise ValueError(
                f"packed must be uint8 [{(elements + 1) // 2}] for a weight of shape {self.shape}, "
                f"got {self.packed.dtype} {list(self.packed.shape)}"
            )
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        if any(part is None for part in nested) != all(part is None for part in nested):
            raise ValueError("nested_absmax, nested_code and nested_offset come together or not at all")
        absmax_dtype = torch.uint8 if self.double_quantized else torch.float32
        if self.absmax.dtype != absmax_dtype or self.absmax.shape != (blocks,):
            raise ValueError(
                f"absmax must be {absmax_dtype} [{blocks}], got {self.absmax.dtype} {list(self.absmax.shape)}"
            )
        if self.nested_absmax is not None and self.nested_code is not None:
            nested_blocks = -(-blocks // self.nested_blocksize)
            if self.nested_absmax.shape != (nested_blocks,) or self.nested_code.shape != (256,):
                raise ValueError(
                    f"nested_absmax must be [{nested_blocks}] and nested_code [256], got "
                    f"{list(self.nested_absmax.shape)} and {list(self.nested_code.shape)}"
                )

    @property
    def double_quantized(self) -> bool:
        """Whether absmax itself is stored as 8-bit codes."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that grows with the weight: codes, absmax, nested absmax, nested map, code table."""
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_code, self.code)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K)."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@cache
def dynamic_map(computed_in: torch.dtype = torch.float32) -> Tensor:
    """Signed 8-bit dynamic map, float32 [256] ascending: 7 decades, each split twice as fine as the one below.

    Decade i in 0..6 holds the 2**i midpoints of linspace(0.1, 1, 2**i + 1) times 10**(i - 6), with both signs;
    0 and 1 complete it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=computed_in)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (decade - 6) * midpoints).tolist()
        values += (-(10 ** (decade - 6)) * midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize(
    weight: Tensor,
    blocksize: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
    tables_in: torch.dtype = torch.float32,
) -> NF4Weight:
    """q = #{thresholds < x * (1 / absmax)} per block; see the module docstring.

    weight: [N, K] float32, bfloat16 or float16; dtype: what the result dequantizes to, the weight's own by default.
    Equals bitsandbytes' quantize_4bit on the same device bit for bit. Two things there are the device's: the offset is
    a mean, the 8-bit map a linspace. With tables_in float64 they have the same bits on every machine, not quite theirs.
    Works in pieces of 4M elements, so that a weight needs no full float32 copy.

    Raises ValueError for another rank, dtype or blocksize.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {list(weight.shape)}")
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    flat = weight.detach().contiguous().view(-1)
    elements = flat.numel()
    packed = torch.empty((elements + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-elements // blocksize), dtype=torch.float32, device=weight.device)
    _quantize_flat(flat, blocksize, packed, absmax)
    shape = (weight.shape[0], weight.shape[1])
    code = _code_tensor().to(weight.device)
    dtype = dtype or weight.dtype
    if not double_quant:
        return NF4Weight(packed, absmax, shape, blocksize, dtype=dtype, code=code)
    offset = absmax.mean(dtype=tables_in).float()
    codes, nested_absmax = _quantize_absmax(absmax - offset, tables_in)
    nested_code = dynamic_map(tables_in).to(weight.device)
    return NF4Weight(packed, codes, shape, blocksize, nested_absmax, nested_code, float(offset), dtype=dtype, code=code)


def _quantize_flat(flat: Tensor, blocksize: int, packed: Tensor, absmax: Tensor) -> None:
    """Fills packed uint8 and absmax float32 from flat [n]; the last block may be short."""
    code = _code_tensor().to(flat.device)
    thresholds = (code[:-1] + code[1:]) / 2
    whole = flat.numel() // blocksize * blocksize
    library = native.library()
    if library is not None and flat.is_cpu:
        library.nf4_quantize(
            flat.data_ptr(),
            native.ELEMENT_TYPES[flat.dtype],
            whole // blocksize,
            blocksize,
            thresholds.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
        )
    else:
        _quantize_blocks(flat[:whole], blocksize, thresholds, packed, absmax)
    if whole < flat.numel():
        tail = flat[whole:].float()
        peak = tail.abs().max().clamp(min=_SMALLEST_ABSMAX)
        absmax[-1] = peak
        scaled = torch.clamp(tail / peak, -1, 1)
        scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
        packed[whole // 2 :] = _pack_nibbles(scaled, thresholds)


def _quantize_blocks(flat: Tensor, blocksize: int, thresholds: Tensor, packed: Tensor, absmax: Tensor) -> None:
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, flat.numel())
        blocks = flat[start:stop].float().view(-1, blocksize)
        peak = blocks.abs().amax(dim=-1)
        absmax[start // blocksize : stop // blocksize] = peak
        scaled = blocks * (1.0 / peak.clamp(min=_SMALLEST_ABSMAX)).unsqueeze(-1)
        packed[start // 2 : stop // 2] = _pack_nibbles(scaled.clamp_(-1, 1).view(-1), thresholds)


def _pack_nibbles(scaled: Tensor, thresholds: Tensor) -> Tensor:
    codes = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2]


@cache
def _absmax_grid(computed_in: torch.dtype) -> Tensor:
    """Code of each of the 65536 grid points 2i / 65535 - 1: the number of map midpoints below it; uint8 [65536]."""
    table = dynamic_map(computed_in)
    points = (2 * torch.arange(_GRID_POINTS, dtype=torch.float32)) / (_GRID_POINTS - 1) - 1.0
    return torch.bucketize(points, (table[:-1] + table[1:]) * 0.5).to(torch.uint8)


def _quantize_absmax(values: Tensor, tables_in: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """8-bit blockwise quantization of float32 [blocks] -> uint8 [blocks], float32 [ceil(blocks / 256)].

    As bitsandbytes does on a CPU: a value is first rounded to one of 65536 grid points in [-1, 1], the point's
    code is looked up. float64 stands in for the fused multiply-add there. An all-zero block takes code 0.
    """
    count = values.numel()
    groups = -(-count // NESTED_BLOCKSIZE)
    padded = torch.nn.functional.pad(values, (0, groups * NESTED_BLOCKSIZE - count)).view(groups, -1)
    peak = padded.abs().amax(dim=-1, keepdim=True)
    scaled = (padded * (1.0 / peak)).nan_to_num_(0.0).clamp_(-1, 1)
    point = (((scaled + 1.0) * 0.5).double() * (_GRID_POINTS - 1) + 0.5).float().long()
    codes = torch.where(peak == 0, 0, _absmax_grid(tables_in).to(values.device)[point])
    return codes.view(-1)[:count].clone(), peak.view(-1)


def dequantize_absmax(weight: NF4Weight) -> Tensor:
    """absmax[b] = nested_code[u8[b]] * nested_absmax[b // 256] + nested_offset -> float32 [blocks]."""
    if weight.nested_absmax is None or weight.nested_code is None or weight.nested_offset is None:
        return weight.absmax
    groups = torch.arange(weight.absmax.numel(), device=weight.absmax.device) // weight.nested_blocksize
    return weight.nested_code[weight.absmax.int()] * weight.nested_absmax[groups] + weight.nested_offset


def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """w = round_to_dtype(code[q] * absmax) -> [N, K] in dtype (weight.dtype by default).

    Equals bitsandbytes' dequantize_4bit bit for bit.
    """
    dtype = dtype or weight.dtype
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    elements = math.prod(weight.shape)
    absmax = dequantize_absmax(weight)
    code = weight.code
    byte = torch.arange(256, device=code.device)
    pairs = torch.stack((code[byte >> 4], code[byte & 15]), dim=-1)  # [256, 2]: the two weights of a byte
    out = torch.empty(elements, dtype=dtype, device=weight.packed.device)
    blocksize = weight.blocksize
    whole = elements // blocksize * blocksize
    for start in range(0, whole, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, whole)
        values = pairs.index_select(0, weight.packed[start // 2 : stop // 2].int()).view(-1, blocksize)
        values *= absmax[start // blocksize : stop // blocksize].unsqueeze(-1)
        out[start:stop] = values.view(-1)
    if whole < elements:
        tail = pairs.index_select(0, weight.packed[whole // 2 :].int()).view(-1)[: elements - whole]
        out[whole:] = tail * absmax[-1]
    return out.view(weight.shape)
