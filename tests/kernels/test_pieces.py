from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorry.kernels import native
from lorry.kernels.pieces import copy_pieces, copy_pieces_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64]
SIZES = (0, 1, 3, 17, 129, 32768, 32769, 100003)


def pieces(dtype: torch.dtype) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """A target of noise, and pieces of every size with a gap of one element before each, from anywhere."""
    noise = torch.randint(0, 256, ((2 * sum(SIZES) + 100) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    placed, begin, offset = [], 0, 0
    for size in SIZES:
        begin, offset = begin + 1, offset + 1
        placed.append((offset, noise[begin : begin + size]))
        begin, offset = begin + size, offset + size
    target = torch.randint(0, 256, ((offset + 1) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    return target, placed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_what_is_copied_has_the_bits_that_torch_copies_and_all_else_stays(dtype: torch.dtype) -> None:
    target, placed = pieces(dtype)
    expected = target.clone()
    for offset, piece in placed:
        expected.view(torch.uint8)[offset * dtype.itemsize :][: piece.nbytes] = piece.view(torch.uint8)
    by_torch = target.clone()
    copy_pieces_reference(by_torch, placed)
    copy_pieces(target, placed)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(by_torch.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.usefixtures("kernels")
def test_nothing_to_copy() -> None:
    target = torch.ones(5)
    copy_pieces(target, [])
    assert target.tolist() == [1.0] * 5


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    target, placed = pieces(torch.bfloat16)
    copy_pieces(target, placed)
    for offset, piece in placed:
        there = target[offset : offset + piece.numel()]
        assert torch.equal(there.view(torch.uint8), piece.view(torch.uint8))


@pytest.mark.parametrize(
    "wrong",
    [(4, torch.ones(2)), (-1, torch.ones(2)), (0, torch.ones(2).double()), (0, torch.ones(2, 3)[:, 0])],
    ids=["beyond", "before", "dtype", "strided"],
)
def test_a_piece_that_does_not_fit_is_refused_before_any_is_copied(wrong: tuple[int, Tensor]) -> None:
    target = torch.zeros(5)
    with pytest.raises(ValueError, match=r"expected|lie within"):
        copy_pieces(target, [(0, torch.ones(2)), wrong])
    assert not target.any()
