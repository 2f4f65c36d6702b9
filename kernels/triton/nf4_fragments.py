"""NF4 weights in the order in which tensor cores read them.

A *unit* is 16 rows by 64 columns of W, one absmax for each row: 512 bytes, of which lane (g, q) of a warp holds 16, so
that a 16-byte load of each lane of a warp is a unit. Byte (s, j, h, e) of lane (g, q) is the weights

    n = g + 8 h,    k = 16 s + 8 j + 2 q + e   (high nibble)    and    k + 32   (low nibble)

which are what that lane feeds to the tensor core: decoded, they change neither lane nor pass through shared memory. For
the operand with four columns to a lane, that of sm_80, k = 16 s + 4 q + 2 j + e. Units lie as [N/16, K/64], absmax as
[K/64, N], 8-bit under double quantization. All of it is a permutation of the checkpoint's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lorry.kernels.nf4 import NF4Weight
from lorry.kernels.triton.common import DEFAULT_SMS, multiprocessors

UNIT_ROWS = 16
UNIT_BYTES = 512
BLOCK = 64  # columns that share an absmax
UNITS = 8  # in a tile: 128 rows of W
SLAB_BYTES = 16 << 20  # of W in 16 bits, dequantized at a time: to stay in the L2 cache until they are multiplied
PROGRAMS_PER_SM = 4  # that the splits of K aim at
LEAST_BLOCKS = 8  # of K in a split
COUNTERS = 8  # of arrivals for each tile of W: tiles of x


class Fragments:
    """NF4 weights [N_i, K] that share K, fused along N; `parts` undoes the permutation.

    sms: multiprocessors, for which the splits of K are chosen; lane_columns: 2 or 4, see the head of this file.
    One product at a time: `arrived` counts the programs of the one that runs. Raises ValueError for what does not fit.
    """

    def __init__(
        self, parts: Sequence[NF4Weight], bias: Tensor | None, *, sms: int = DEFAULT_SMS, lane_columns: int = 2
    ) -> None:
        if not fits(parts):
            raise ValueError("parts need blocksize 64, K % 64 == 0, N % 16 == 0 and one kind of absmax and code")
        self.sizes = [part.shape[0] for part in parts]
        self.out_features, self.in_features = sum(self.sizes), parts[0].shape[1]
        self.blocks = self.in_features // BLOCK
        self.lane_columns = lane_columns
        self.units = torch.cat([_to_units(part, lane_columns) for part in parts])  # uint8 [N/16, K/64, 512]
        self.bias = None if bias is None else bias.float().contiguous().to(self.units.device)
        self.absmax = torch.cat([part.absmax.view(-1, self.blocks) for part in parts]).T.contiguous()  # [K/64, N]
        self.nested_shift = parts[0].nested_blocksize.bit_length() - 1 if parts[0].double_quantized else -1
        self.row_in_group = self.nested_shift < 0 or (1 << self.nested_shift) % self.blocks == 0
        device, groups = self.units.device, [0] * len(parts)
        self.nested_absmax = self.nested_code = torch.zeros(1, device=device)
        if self.nested_shift >= 0:
            scales = [part.nested_absmax for part in parts if part.nested_absmax is not None]
            groups = [scale.numel() for scale in scales]
            self.nested_absmax = torch.cat(scales)
            self.nested_code = torch.cat([part.nested_code for part in parts if part.nested_code is not None])
        self.offsets = torch.tensor([part.nested_offset or 0.0 for part in parts], device=device)
        self.codes = parts[0].code.float().to(device)
        self.tables = {dtype: code_tables(self.codes, dtype) for dtype in (torch.bfloat16, torch.float16)}
        starts, ends = _starts(self.sizes), _starts(self.sizes)[1:]
        table = [*zip(starts, ends, _starts(groups), strict=False)]
        self.table = torch.tensor(table, dtype=torch.int32, device=device)  # first and past-the-last row, nested group
        self._rest = [
            partial(
                NF4Weight,
                shape=part.shape,
                nested_absmax=part.nested_absmax,
                nested_code=part.nested_code,
                nested_offset=part.nested_offset,
                nested_blocksize=part.nested_blocksize,
                dtype=part.dtype,
                code=part.code,
            )
            for part in parts
        ]

        cut = _tiles(self.sizes)
        self.tiles = torch.tensor(cut, dtype=torch.int32, device=device)  # [tiles, 2]: first row of W, part
        self.slabs = _slabs(cut, self.out_features, self.in_features)
        self.splits = max(1, min(round(PROGRAMS_PER_SM * sms / len(cut)), self.blocks // LEAST_BLOCKS))
        self.mid_splits = 2 if 2 * len(cut) <= sms else 1
        self.arrived = torch.zeros(len(cut) * COUNTERS, dtype=torch.int32, device=device)

    @classmethod
    def on_device(cls, parts: Sequence[NF4Weight], bias: Tensor | None) -> Fragments:
        """For the GPU that holds the parts."""
        device = parts[0].packed.device
        major, _ = torch.cuda.get_device_capability(device)
        return cls(parts, bias, sms=multiprocessors(device), lane_columns=2 if major in (9, 10) else 4)

    @property
    def parts(self) -> list[NF4Weight]:
        """The weights this was made of, bit for bit."""
        units = torch.split(self.units, [size // UNIT_ROWS for size in self.sizes])
        absmax = torch.split(self.absmax.T, self.sizes)
        return [
            rest(packed=_from_units(unit, self.lane_columns), absmax=scale.reshape(-1))
            for rest, unit, scale in zip(self._rest, units, absmax, strict=True)
        ]


def fits(parts: Sequence[NF4Weight]) -> bool:
    """Whether the kernels can serve these weights together."""
    first = parts[0]
    return all(
        part.blocksize == BLOCK
        and part.shape[1] == first.shape[1]
        and part.shape[1] % BLOCK == 0
        and part.shape[0] % UNIT_ROWS == 0
        and part.double_quantized == first.double_quantized
        and part.nested_blocksize == first.nested_blocksize
        and part.nested_blocksize.bit_count() == 1
        and torch.equal(part.code.to(first.code.device), first.code)
        for part in parts
    )


def code_tables(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 [8, 32]: the high bytes of the 16 codes in 16-bit `dtype`, four to a word, the low ones, for each lane."""
    bytes = codes.to(dtype).view(torch.uint8).view(16, 2).T.flip(0).contiguous()  # high, low; little-endian
    return bytes.view(torch.int32).view(8, 1).expand(8, 32).contiguous()


def _starts(sizes: Sequence[int]) -> list[int]:
    """[0, sizes[0], sizes[0] + sizes[1], …]"""
    return [sum(sizes[:index]) for index in range(len(sizes) + 1)]


def _tiles(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(first row of W, part) of each tile of UNITS units; a tile lies in one part."""
    step = UNITS * UNIT_ROWS
    return [
        (row, part)
        for part, (start, size) in enumerate(zip(_starts(sizes), sizes, strict=False))
        for row in range(start, start + size, step)
    ]


def _slabs(tiles: Sequence[tuple[int, int]], rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """(first tile, tiles, first row, past the last row) of slabs of at most SLAB_BYTES in 16 bits, or one tile."""
    most, slabs = max(1, SLAB_BYTES // (2 * columns)), []
    first = 0
    for index in range(1, len(tiles) + 1):
        end = tiles[index][0] if index < len(tiles) else rows
        following = tiles[index + 1][0] if index + 1 < len(tiles) else rows
        if index == len(tiles) or following - tiles[first][0] > most:
            slabs.append((first, index - first, tiles[first][0], end))
            first = index
    return slabs


def _to_units(part: NF4Weight, lane_columns: int) -> Tensor:
    """[N/16, K/64, 512] from the checkpoint's bytes: row-major, the even column of a pair in the high nibble."""
    rows, columns = part.shape
    codes = torch.stack((part.packed >> 4, part.packed & 15), -1).view(rows, columns)
    halves = codes.view(rows // 16, 2, 8, columns // 64, 2, 32)  # unit, h, g, block, high or low, k
    columns_axes = (2, 2, 4, 2) if lane_columns == 2 else (2, 4, 2, 2)  # s, j, q, e or s, q, j, e
    axes = halves.view(rows // 16, 2, 8, columns // 64, 2, *columns_axes)
    s, j, q, e = (5, 6, 7, 8) if lane_columns == 2 else (5, 7, 6, 8)
    axes = axes.permute(4, 0, 3, 2, q, s, j, 1, e)  # high or low, unit, block, g, q, s, j, h, e
    return (axes[0] << 4 | axes[1]).reshape(rows // 16, columns // 64, UNIT_BYTES)


def _from_units(units: Tensor, lane_columns: int) -> Tensor:
    """The checkpoint's bytes [N K / 2] of units [N/16, K/64, 512]."""
    count, blocks, _ = units.shape
    axes = torch.stack((units >> 4, units & 15)).view(2, count, blocks, 8, 4, 2, 2, 2, 2)
    half, unit, block, g, q, s, j, h, e = range(9)
    column = (s, j, q, e) if lane_columns == 2 else (s, q, j, e)
    codes = axes.permute(unit, h, g, block, half, *column).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]
