"""The safetensors format, strictly: every byte of the file belongs to the header or to exactly one tensor.

    8 bytes n, little-endian · n bytes JSON {name: {dtype, shape, data_offsets}} · data

Source: the format section of the safetensors documentation. The tensors are views into the bytes that were read, and
hashed, once: nothing is mapped, so a file that changes while it is served changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.strict_json import parse_object

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 16 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MAX_EXTENT = 1 << 40
_EXPONENTS = {
    torch.float32: (0x7F800000, torch.int32),
    torch.float16: (0x7C00, torch.int16),
    torch.bfloat16: (0x7F80, torch.int16),
}


def parse_tensors(data: bytearray) -> dict[str, Tensor]:
    """Name → tensor for all tensors of a file. They share the memory of `data`.

    Raises MalformedAdapter for anything but float32, float16 and bfloat16 tensors that fill the file without gap.
    """
    if len(data) < 8:
        raise _wrong(f"has {len(data)} bytes, shorter than its header")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > MAX_HEADER_BYTES or header_bytes > len(data) - 8:
        raise _wrong(f"is truncated: its header should have {header_bytes} bytes, the file has {len(data)}")
    header = parse_object(bytes(data[8 : 8 + header_bytes]), f"the header of {WEIGHTS_NAME}", MAX_HEADER_BYTES)
    header.pop("__metadata__", None)
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    start, size = 8 + header_bytes, len(data) - 8 - header_bytes
    position = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise _wrong(f"has a gap or an overlap at byte {begin} of its data", name)
        position = end
    if position != size:
        raise _wrong(f"is truncated or has surplus bytes: its tensors need {position}, it has {size}")
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if begin == end:
            raise _wrong(f"has the empty tensor {name[:200]!r}", name)
        view = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=start + begin)
        aligned = view if (start + begin) % dtype.itemsize == 0 else view.clone()
        tensors[name] = aligned.view(dtype).view(shape)
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether a contiguous float32, float16 or bfloat16 tensor holds neither NaN nor infinity.

    Both have an exponent of ones. On the bits and in one thread, so that the loader takes no core from the engine.
    """
    exponent, bits = _EXPONENTS[tensor.dtype]
    values = tensor.view(bits).numpy()
    return not bool(((values & exponent) == exponent).any())


def _entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(f"describes {name[:200]!r} other than by dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _wrong(f"has {name[:200]!r} in {str(dtype)[:20]!r}, served are {', '.join(DTYPES)}", name)
    if not _extents(shape) or not _extents(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _wrong(f"gives {name[:200]!r} a shape or an offset that is no list of sizes", name)
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _extents(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_EXTENT for item in value)


def _wrong(what: str, tensor: str = WEIGHTS_NAME) -> MalformedAdapter:
    return MalformedAdapter(f"{WEIGHTS_NAME} {what}", tensor[:200])
