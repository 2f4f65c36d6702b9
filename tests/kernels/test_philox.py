"""The counter-based generator against its published vectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.kernels.philox import philox4x32, uniforms, uniforms_reference

VECTORS = [  # Random123's kat_vectors: counter, key, output of philox 4x32, 10 rounds
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_known_answers() -> None:
    counter, key, expected = (np.array([words(v[i]) for v in VECTORS], np.uint64).T for i in range(3))
    assert philox4x32(counter, key).tolist() == expected.tolist()


def scalar_uniform(seed: int, index: int, position: int, stream: int) -> float:
    """The same function once more, from the paper, with Python's integers."""
    mask = 0xFFFFFFFF
    c = [position & mask, position >> 32, index, stream]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return ((c[0] << 32 | c[1]) >> 11) / 2**53


word, double_word = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(double_word, word, double_word), min_size=1, max_size=7), word)
def test_uniforms_follow_the_formula_row_by_row(rows: list[tuple[int, int, int]], stream: int) -> None:
    seeds, indices, positions = zip(*rows, strict=True)
    expected = [scalar_uniform(*row, stream) for row in rows]
    assert uniforms(seeds, indices, positions, stream).tolist() == expected
    columns = (np.array(column, np.uint64) for column in (seeds, indices, positions))
    assert uniforms_reference(*columns, stream).tolist() == expected


@pytest.mark.parametrize("axis", ["seed", "index", "position"])
def test_uniforms_are_uniform_along_every_axis(axis: str) -> None:
    count = 20_011
    ramp, zero = list(range(count)), [5] * count
    arguments = [ramp if axis == name else zero for name in ("seed", "index", "position")]
    draws = uniforms(*arguments)
    cells = np.histogram(draws, bins=100, range=(0, 1))[0]
    chi_square = float(((cells - count / 100) ** 2 / (count / 100)).sum())
    assert chi_square < 149.4  # 99 degrees of freedom, p = 0.0008; the draws are fixed
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="of one length, not 2, 1, 2"):
        uniforms([1, 2], [0], [0, 0])
