"""What truncation leaves of a distribution, and a draw from it.

The cuts in their order, that of transformers' warpers, each on what the ones before it left:

    temperature → top-nσ → top-k → top-p → min-p → typical-p → epsilon (or mirostat's) → eta

transformers has no top-nσ; it stands where llama.cpp has it, before the others. One file for each in `cuts/`, which
says it in torch, for a vocabulary sorted by whoever has the logits: a GPU, a CPU without a compiler, the tests. A CPU
with one leaves it to `lorry.kernels.truncation`, which does not sort.

A draw goes through what is left in the order of falling z. It goes in the order of the token ids where that is 2048
tokens or more of a longer vocabulary, or where top-k left that many to top-p in a row with no other cut but min-p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import truncation, vocabulary
from lorry.kernels.truncation import COLUMNS, OFF
from lorry.server.decoding.cuts import epsilon, eta, min_p, top_k, top_n_sigma, top_p, typical
from lorry.server.decoding.cuts.left import Left
from lorry.server.decoding.interface import Row
from lorry.server.decoding.rowwise import Doubles, Ints, draw, first_above, nth_equal, probabilities

WIDE = 2048  # tokens from which on a draw goes by ids
TINY = np.float32(1e-30)  # keeps a temperature that float32 would round to 0 a divisor

Cut = Callable[[Left, Tensor], None]
CUTS: dict[str, Cut] = {
    "top_n_sigma": top_n_sigma.cut,
    "top_k": top_k.cut,
    "top_p": top_p.cut,
    "min_p": min_p.cut,
    "typical_p": typical.cut,
    "epsilon": epsilon.cut,
    "eta": eta.cut,
}
assert tuple(CUTS) == COLUMNS[1:], "one order for all"


def truncated(row: Row) -> bool:
    """Whether a row that is not greedy has any cut."""
    sampling = row.sampling
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0 or extended(row)


def extended(row: Row) -> bool:
    """Whether a row has a cut that `lorry.kernels.sampling` does not know."""
    sampling = row.sampling
    return (
        sampling.typical_p < 1.0
        or sampling.epsilon_cutoff > 0.0
        or sampling.eta_cutoff > 0.0
        or sampling.top_n_sigma > 0.0
        or sampling.mirostat is not None
    )


@dataclass(frozen=True)
class Stage:
    """One cut of some rows. rows: int64 [A], None: all; values: float64 [A]."""

    cut: Cut
    rows: Tensor | None
    values: Tensor


@dataclass(frozen=True)
class Truncation:
    """numbers: float64 [R, 8], the `COLUMNS` of `lorry.kernels.truncation`, `OFF` where a row lacks the cut."""

    numbers: Doubles

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Truncation:
        """Without mirostat's epsilons, which are no parameters."""
        return cls(np.array([_numbers(row) for row in rows], np.float64).reshape(-1, len(COLUMNS)))

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> Doubles:
        return np.ascontiguousarray(self.numbers[:, COLUMNS.index(name)])

    def with_epsilon(self, rows: Sequence[int], values: Doubles) -> Truncation:
        """Mirostat's thresholds put in."""
        numbers = self.numbers.copy()
        numbers[rows, COLUMNS.index("epsilon")] = values
        return Truncation(numbers)

    def arrays(self) -> list[tuple[Cut, Ints | None, Doubles]]:
        """The stages before they travel."""
        found: list[tuple[Cut, Ints | None, Doubles]] = []
        for (name, cut), off in zip(CUTS.items(), OFF[1:], strict=True):
            values = self.column(name)
            at = np.flatnonzero(values != off)
            if at.size:
                found.append((cut, None, values) if at.size == len(self) else (cut, at, values[at]))
        return found

    def stages(self) -> list[Stage]:
        """What `narrow` takes, on the CPU."""
        return [
            Stage(cut, None if rows is None else torch.from_numpy(rows), torch.from_numpy(values))
            for cut, rows, values in self.arrays()
        ]


def _numbers(row: Row) -> tuple[float, ...]:
    sampling = row.sampling
    return (
        max(float(np.float32(sampling.temperature)), float(TINY)),
        sampling.top_n_sigma,
        sampling.top_k or np.inf,
        sampling.top_p,
        sampling.min_p,
        sampling.typical_p,
        sampling.epsilon_cutoff,
        sampling.eta_cutoff,
    )


def narrow(left: Left, stages: Sequence[Stage]) -> None:
    """Apply the cuts; a row that lacks one is not touched by it."""
    for stage in stages:
        if stage.rows is None:
            stage.cut(left, stage.values)
        else:
            part = left[stage.rows]
            stage.cut(part, stage.values)
            left.put(stage.rows, part)


def truncated_draw(logits: Tensor, cuts: Truncation, uniform: Doubles) -> Ints:
    """Draw from what the cuts leave.

    logits: float32 [R, V]; uniform: float64 [R] in [0, 1). Returns int64 [R], token ids.
    """
    if vocabulary.serves(logits):
        return truncation.truncated_draw(logits, cuts.numbers, uniform)
    left = kept(logits, cuts)
    low, high = left.bounds()
    p = probabilities(logits, cuts.column("temperature").astype(np.float32))
    p[:, : logits.shape[1]].masked_fill_((logits < low[:, None]) | (logits > high[:, None]), 0.0)
    return np.where(_wide(left, cuts), draw(p, uniform), _falling(logits, left, uniform))


def kept(logits: Tensor, cuts: Truncation) -> Left:
    """What the cuts leave of float32 [R, V], by sorting it."""
    sigma = top_n_sigma.deviation(logits) if cuts.column("top_n_sigma").any() else None
    values = logits.sort(dim=1, descending=True).values
    left = Left.of(values, torch.from_numpy(cuts.column("temperature")), sigma)
    narrow(left, cuts.stages())
    return left


def _wide(left: Left, cuts: Truncation) -> NDArray[np.bool_]:
    """bool [R], rows whose draw goes in the order of the token ids."""
    size = left.values.shape[1]
    others = [COLUMNS.index(name) for name in ("top_n_sigma", "typical_p", "epsilon", "eta")]
    plain = (cuts.numbers[:, others] == np.array(OFF)[others]).all(axis=1)
    top_k = cuts.column("top_k")
    of_top_k = left.up_to_equals(torch.from_numpy(np.minimum(top_k, size)).long()).numpy()
    before = plain & (cuts.column("top_p") < 1) & (top_k < size) & (of_top_k >= WIDE)
    wide: NDArray[np.bool_] = before | ((left.end - left.start).numpy() >= WIDE)
    return wide & (size > WIDE)


def _falling(logits: Tensor, left: Left, uniform: Doubles) -> Ints:
    """Draw from the windows of `left`, whose logits are given, in the order of falling z."""
    top = left.values.numpy()
    inside = torch.where(left.inside(), left.weights, 0.0).numpy()
    cumulative = np.cumsum(inside, axis=1)
    rank = first_above(cumulative, uniform * cumulative[:, -1])
    values = top[np.arange(len(top)), rank]
    nth = rank - np.argmax(top == values[:, None], axis=1)
    return nth_equal(logits, values, nth)
