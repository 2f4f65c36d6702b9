"""Random numbers that depend only on who draws them.

    u(seed, index, position, stream) = ⌊Philox4x32-10(counter, key) / 2¹¹⌋ · 2⁻⁵³     (the first 64 bits of the block)
    key = (seed mod 2³², seed div 2³²),  counter = (position mod 2³², position div 2³², index, stream)

There is no state: a sequence's n-th token gets the same number alone, in any batch, and after a preemption.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorry.kernels import native

Words = NDArray[np.uint64]
TOKEN_STREAM = 0  # the draw of a token; every other use of randomness takes a stream of its own

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[[i * 0x9E3779B9 & 0xFFFFFFFF], [i * 0xBB67AE85 & 0xFFFFFFFF]] for i in range(10)], np.uint64)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: Words, key: Words) -> Words:
    """Philox4x32-10, a bijection of 128-bit counters for each 64-bit key.

    counter: uint64 [4, R], key: uint64 [2, R]; each element holds one 32-bit word
    Returns uint64 [4, R], one 32-bit word each.
    """
    even, odd = counter[0::2], counter[1::2]  # words 0, 2 and words 1, 3
    for round_key in _WEYL:
        product = even * _MULTIPLIERS
        high, low = product >> _SHIFT, product & _MASK
        even = high[::-1] ^ odd ^ ((key + round_key) & _MASK)
        odd = low[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(
    seeds: ArrayLike, indices: ArrayLike, positions: ArrayLike, stream: int = TOKEN_STREAM
) -> NDArray[np.float64]:
    """One number in [0, 1) per row, a multiple of 2⁻⁵³.

    seeds: R numbers of unsigned 64 bits
    indices: number of the sequence within its request, < 2³²
    positions: how many tokens the sequence has put out before this one
    stream: separates uses of randomness at one position, < 2³²
    Returns float64 [R].
    """
    seed, index, position = (np.array(column, dtype=np.uint64) for column in (seeds, indices, positions))
    if not seed.shape == index.shape == position.shape:
        raise ValueError(f"seeds, indices and positions of one length, not {seed.size}, {index.size}, {position.size}")
    library = native.library()
    if library is None:
        return uniforms_reference(seed, index, position, stream)
    numbers = np.empty(seed.shape)
    columns = (column.ctypes.data for column in (seed, index, position))
    native.check(library.philox_uniforms(*columns, stream, seed.size, numbers.ctypes.data))
    return numbers


def uniforms_reference(seed: Words, index: Words, position: Words, stream: int) -> NDArray[np.float64]:
    """As `uniforms`; uint64 [R] each."""
    counter = np.stack((position & _MASK, position >> _SHIFT, index, np.full_like(index, stream)))
    block = philox4x32(counter, np.stack((seed & _MASK, seed >> _SHIFT)))
    bits = (block[0] << _SHIFT) | block[1]
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers
