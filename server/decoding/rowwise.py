"""Reductions along the vocabulary in which a row has the same bits whatever other rows there are.

Measured on two cores, 16 rows × 49,152: `torch.argmax` 1.0 ms, numpy's 0.13 ms; `torch.topk(64)` 2.3 ms,
`torch.sort` 43 ms, the block maxima of `top_values` 0.6 ms, numpy's vectorised partition 1.3 ms and sort 3.7
ms. Hence numpy, which shares the memory of a tensor on the CPU; no other tensors come here. What passes over the whole
vocabulary more than once is done by `lorry.kernels.vocabulary` where it serves.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import vocabulary

BLOCK = 16  # elements under one maximum: smaller blocks cost more maxima, larger ones a longer candidate list
WIDTH = 128  # elements under one partial sum; divides the vocabularies of the Llama family, so that nothing is padded

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]


def argmax(logits: Tensor) -> Ints:
    """The first index of each row's largest value.

    logits: float32 [R, V]. Returns int64 [R].
    """
    return np.asarray(np.argmax(logits.numpy(), axis=1), np.int64)


def top_values(logits: Tensor, count: int) -> NDArray[np.float32]:
    """The `count` largest values of each row, descending; values only, so ties have no order to get wrong.

    logits: float32 [R, V], no NaN. Returns float32 [R, min(count, V)].
    """
    if vocabulary.serves(logits):
        return vocabulary.top_values(logits, count)
    size = logits.shape[1]
    count = min(count, size)
    values = logits.numpy()
    if count * BLOCK * 4 <= size:
        values = _candidates(logits, count)
    if count * 4 <= values.shape[1]:
        values = np.partition(values, values.shape[1] - count, axis=1)[:, -count:]
    return np.sort(values, axis=1)[:, : -count - 1 : -1]


def _candidates(logits: Tensor, count: int) -> NDArray[np.float32]:
    """A superset of each row's `count` largest: the blocks with the `count` largest maxima, and the ragged end.

    A block is every `blocks`-th element, so that its maximum is a vertical one. An element among the `count`
    largest lies in a block whose maximum is at least as large, and fewer than `count` other blocks have a
    larger one.
    """
    rows, size = logits.shape
    blocks = size // BLOCK
    body = logits[:, : blocks * BLOCK].view(rows, BLOCK, blocks)
    maxima = body.amax(dim=1).numpy()
    chosen = np.argpartition(maxima, blocks - count, axis=1)[:, -count:]
    inside = np.take_along_axis(body.numpy(), chosen[:, None, :], axis=2).reshape(rows, BLOCK * count)
    return np.concatenate((inside, logits[:, blocks * BLOCK :].numpy()), axis=1)


def nth_equal(logits: Tensor, values: NDArray[np.float32], nth: Ints) -> Ints:
    """The index of the `nth[r]`-th element of row r, from 0, that equals `values[r]`; 0 if there is none.

    logits: float32 [R, V]; values: float32 [R]; nth: int64 [R]. Returns int64 [R].
    """
    if vocabulary.serves(logits):
        return vocabulary.nth_equal(logits, values, nth)
    equal = logits.numpy() == values[:, None]
    found = np.asarray(equal.argmax(axis=1), np.int64)
    for row in np.flatnonzero(nth):
        found[row] = next(iter(np.flatnonzero(equal[row])[nth[row] :]), 0)
    return found


def probabilities(logits: Tensor, temperatures: NDArray[np.float32]) -> Tensor:
    """p[r, t] = softmax((z[r] - max z[r]) / T[r])[t], then zeros up to a multiple of `WIDTH`.

    Subtracting first keeps the largest exact at any T. softmax is torch's, whose kernel works row by row.
    logits: float32 [R, V]; temperatures: float32 [R], > 0. Returns float32 [R, ⌈V / WIDTH⌉ · WIDTH].
    """
    if np.any(temperatures != 1.0):
        logits = logits - logits.amax(dim=1, keepdim=True)
        logits.div_(torch.from_numpy(temperatures)[:, None])
    p = torch.softmax(logits, dim=1)
    ragged = p.shape[1] % WIDTH
    return torch.nn.functional.pad(p, (0, WIDTH - ragged)) if ragged else p


def likelihoods(logits: Tensor, temperatures: NDArray[np.float32], tokens: Ints) -> Doubles:
    """p of one token of each row; float32 [R, V], float32 [R], int64 [R] -> float64 [R]."""
    rows = np.arange(len(tokens))
    if not vocabulary.serves(logits):
        return probabilities(logits, temperatures).numpy()[rows, tokens].astype(np.float64)
    z = logits.numpy()
    below = z[rows, tokens] - z.max(axis=1)
    weights: Doubles = np.exp(below / temperatures.astype(np.float64))
    return weights / vocabulary.totals(logits, temperatures)


def cumulative_sums(p: Tensor) -> Doubles:
    """Sums of all elements up to the end of each span of `WIDTH`: float32 within a span, float64 over spans.

    p: float32 [R, C · WIDTH]. Returns float64 [R, C].
    """
    sums = p.view(len(p), -1, WIDTH).sum(dim=2)
    return np.cumsum(sums.numpy(), axis=1, dtype=np.float64)


def plain_draw(logits: Tensor, temperatures: NDArray[np.float32], uniform: Doubles) -> Ints:
    """The inverse of the cumulative distribution of p ∝ exp(z / T) in the order of the token ids.

    logits: float32 [R, V]; temperatures: float32 [R], > 0; uniform: float64 [R] in [0, 1). Returns int64 [R].
    """
    if vocabulary.serves(logits):
        return vocabulary.draw(logits, temperatures, uniform)
    return draw(probabilities(logits, temperatures), uniform)


def draw(p: Tensor, uniform: Doubles) -> Ints:
    """The inverse of the cumulative distribution in the order of the token ids.

    p: float32 [R, C · WIDTH]; uniform: float64 [R] in [0, 1). Returns int64 [R].
    """
    rows = np.arange(len(p))
    cumulative = cumulative_sums(p)
    target = uniform * cumulative[:, -1]
    span = first_above(cumulative, target)
    before = np.where(span > 0, cumulative[rows, span - 1], 0.0)
    inside = p.view(len(p), -1, WIDTH)[torch.from_numpy(rows), torch.from_numpy(span)]
    return span * WIDTH + first_above(np.cumsum(inside.numpy(), axis=1, dtype=np.float64), target - before)


def first_above(cumulative: Doubles, target: Doubles) -> Ints:
    """The first place of each row whose cumulative sum exceeds the target; if rounding left none, the last that adds.

    cumulative: float64 [R, C], not decreasing; target: float64 [R]. Returns int64 [R].
    """
    above = cumulative > target[:, None]
    none = ~above[:, -1]
    if none.any():
        above[none] = cumulative[none] == cumulative[none, -1:]
    return np.asarray(above.argmax(axis=1), np.int64)
