from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorry.kernels import native, nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 63), (5, 64), (7, 65), (33, 129), (3, 577), (64, 576), (321, 1537))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def eager() -> Iterator[None]:
    """bitsandbytes compiles its odd shapes, which takes seconds and changes nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 3e-4])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("eager")
def test_equals_bitsandbytes_bit_for_bit(
    shape: tuple[int, int],
    dtype: torch.dtype,
    double_quant: bool,
    scale: float,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(shape) * scale).to(dtype)
    if shape[0] > 3:
        weight[2] = 0  # all-zero blocks
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    ours = nf4.quantize(weight, 64, double_quant)
    assert torch.equal(ours.packed, packed.view(-1))
    assert same_bits(ours.absmax, state.absmax)
    assert ours.dtype == dtype
    if double_quant:
        assert ours.nested_absmax is not None
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert ours.nested_code is not None
        assert same_bits(ours.nested_code, state.state2.code)
        assert ours.nested_offset == float(state.offset)
    for out in DTYPES:
        state.dtype = out
        assert same_bits(nf4.dequantize(ours, out), bnb.dequantize_4bit(packed, state).view(shape)), out


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_native_equals_the_reference(dtype: torch.dtype, blocksize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (torch.randn(131, 131) * 1e-3).to(dtype)
    weight[7] = 0
    ours = nf4.quantize(weight, blocksize)
    monkeypatch.setattr(native, "library", lambda: None)
    reference = nf4.quantize(weight, blocksize)
    assert torch.equal(ours.packed, reference.packed)
    assert torch.equal(ours.absmax, reference.absmax)
    assert ours.nested_offset == reference.nested_offset


@pytest.mark.parametrize("chunk", [64, 192, 1 << 22])
def test_chunks_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    weight = torch.randn(37, 95)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "_CHUNK_ELEMENTS", chunk)
    pieces = nf4.quantize(weight)
    assert torch.equal(whole.packed, pieces.packed)
    assert torch.equal(whole.absmax, pieces.absmax)
    assert torch.equal(nf4.dequantize(whole), nf4.dequantize(pieces))


def test_nibbles_and_blocks_by_hand() -> None:
    weight = torch.zeros(2, 48)
    weight[0, :3] = torch.tensor([1.0, -1.0, 0.5626170039176941])
    weight[1, 16:19] = torch.tensor([0.0, 4.0, -2.1])  # flat 64..: the second block begins inside row 1
    ours = nf4.quantize(weight, double_quant=False)
    assert ours.packed[:2].tolist() == [0xF0, 0xD7]
    assert ours.packed[32:34].tolist() == [0x7F, 0x27]
    assert ours.absmax.tolist() == [1.0, 4.0]


def test_double_quantization_stays_below_4_13_bits() -> None:
    weight = nf4.quantize(torch.randn(1536, 576))
    assert weight.absmax.dtype == torch.uint8
    assert weight.bits_per_weight < 4.141  # 4.127 for a large weight; 1 KiB of nested map here
    assert nf4.quantize(torch.randn(4096, 1024)).bits_per_weight < 4.13


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        (torch.zeros(4), 64, "shape"),
        (torch.zeros(4, 4, dtype=torch.int32), 64, "float32, bfloat16 or float16"),
        (torch.zeros(4, 4), 48, "blocksize must be one of"),
    ],
)
def test_refuses_by_name(weight: Tensor, blocksize: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nf4.quantize(weight, blocksize)


def test_a_weight_of_wrong_parts_is_refused() -> None:
    good = nf4.quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match="packed must be uint8"):
        nf4.NF4Weight(good.packed[:-1], good.absmax, good.shape)
    with pytest.raises(ValueError, match="absmax must be"):
        nf4.NF4Weight(good.packed, good.absmax, good.shape)
    with pytest.raises(ValueError, match="come together"):
        nf4.NF4Weight(good.packed, good.absmax, good.shape, nested_absmax=good.nested_absmax)
