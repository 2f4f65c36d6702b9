"""The safetensors format, strictly: every byte of the file belongs to the header or to exactly one tensor.

    8 bytes n, little-endian · n bytes JSON {name: {dtype, shape, data_offsets}} · data

Source: the format section of the safetensors documentation. The tensors are views into the bytes that were read, and
hashed, once: nothing is mapped, so a file that changes while it is served changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.reading.strict_json import parse_object

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 4 << 20
PREFIX_BYTES = 8  # the header's length
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_METADATA = "__metadata__"
_MAX_EXTENT = 1 << 40
_EXPONENTS = {
    torch.float32: (0x7F800000, torch.int32),
    torch.float16: (0x7C00, torch.int16),
    torch.bfloat16: (0x7F80, torch.int16),
}
_FOREIGN = {  # by their first bytes
    b"PK\x03\x04": "a zip archive, such as torch.save writes",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"version ": "a Git LFS pointer, fetch the file itself",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: bytes `begin` to `end` of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a file says, checked against the file's size. data_start: of the data, in bytes."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    data_start: int


def header_bytes(prefix: bytes, file_bytes: int, file: str = WEIGHTS_NAME) -> int:
    """Length of the header, from the file's first bytes (8 at least, or all there are).

    file: its name. Raises MalformedAdapter when a file of that size cannot have it.
    """
    if file_bytes < PREFIX_BYTES:
        raise _wrong(file, f"has {file_bytes} bytes, shorter than its header")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES or length > file_bytes - PREFIX_BYTES:
        for magic, kind in _FOREIGN.items():
            if prefix.startswith(magic):
                raise _wrong(file, f"is {kind}")
        if length > MAX_HEADER_BYTES:
            raise _wrong(file, f"says that its header has {length} bytes, at most {MAX_HEADER_BYTES} are read")
        raise _wrong(file, f"is truncated: its header should have {length} bytes, the file has {file_bytes}")
    return length


def parse_header(head: bytes, file_bytes: int, file: str = WEIGHTS_NAME) -> Header:
    """The header at the start of `head`, of a file of `file_bytes` that its tensors must fill without gap.

    file: its name. Raises MalformedAdapter for anything but float32, float16 and bfloat16 tensors, none of them empty.
    """
    length = header_bytes(head, file_bytes, file)
    start = PREFIX_BYTES + length
    values = parse_object(head[PREFIX_BYTES:start], f"the header of {file}", MAX_HEADER_BYTES)
    metadata = values.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _wrong(file, f"has {_METADATA} that are no texts", _METADATA)
    tensors = {name: _entry(name, entry, file) for name, entry in values.items()}
    size = file_bytes - start
    position = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != position or stored.end - position != math.prod(stored.shape) * stored.dtype.itemsize:
            raise _wrong(file, f"has a gap or an overlap at byte {stored.begin} of its data", name)
        if stored.begin == stored.end:
            raise _wrong(file, f"has the empty tensor {name[:200]!r}", name)
        position = stored.end
    if position != size:
        raise _wrong(file, f"is truncated or has surplus bytes: its tensors need {position}, it has {size}")
    return Header(tensors, metadata, start)


def parse_tensors(data: bytearray, header: Header | None = None) -> dict[str, Tensor]:
    """Name → tensor for all tensors of a file. They share the memory of `data`.

    header: what `parse_header` has made of the same bytes. Raises MalformedAdapter as that does.
    """
    if header is None:
        head = memoryview(data)[: PREFIX_BYTES + MAX_HEADER_BYTES]
        header = parse_header(bytes(head), len(data))
    tensors = {}
    for name, stored in header.tensors.items():
        offset = header.data_start + stored.begin
        view = torch.frombuffer(data, dtype=torch.uint8, count=stored.end - stored.begin, offset=offset)
        aligned = view if offset % stored.dtype.itemsize == 0 else view.clone()
        tensors[name] = aligned.view(stored.dtype).view(stored.shape)
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether a contiguous float32, float16 or bfloat16 tensor holds neither NaN nor infinity.

    Both have an exponent of ones. On the bits and in one thread, so that the loader takes no core from the engine.
    """
    exponent, bits = _EXPONENTS[tensor.dtype]
    values = tensor.view(bits).numpy()
    return not bool(((values & exponent) == exponent).any())


def _entry(name: str, entry: object, file: str) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(file, f"describes {name[:200]!r} other than by dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _wrong(file, f"has {name[:200]!r} in {str(dtype)[:20]!r}, served are {', '.join(DTYPES)}", name)
    if not _extents(shape) or not _extents(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _wrong(file, f"gives {name[:200]!r} a shape or an offset that is no list of sizes", name)
    return Stored(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _extents(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_EXTENT for item in value)


def _wrong(file: str, what: str, tensor: str = "") -> MalformedAdapter:
    return MalformedAdapter(f"{file} {what}", (tensor or file)[:200])
