"""What truncation leaves of a distribution, and a draw from it.

The cuts in their order, that of transformers' warpers, each on what the ones before it left:

    temperature → top-nσ → top-k → top-p → min-p → typical-p → epsilon (or mirostat's) → eta

transformers has no top-nσ; it stands where llama.cpp has it, before the others. One file for each in `cuts/`.

Rows do not sort the vocabulary. The largest 128 values come from block maxima; if what is left lies beyond them, the
largest 2048 from a partition; only a row that keeps more, or whose cuts need sums that the list does not tell, has its
vocabulary sorted. A draw goes through what is left in the order of falling z; in rows that keep 2048 tokens or more,
and in those of top-k, top-p and min-p alone that no list decides, in the order of the token ids.

Sums run in float64 from the largest down, and how a row is done depends on that row only, so that its draw has the same
bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.server.decoding.cuts import epsilon, eta, min_p, top_k, top_n_sigma, top_p, typical
from lorry.server.decoding.cuts.left import Left
from lorry.server.decoding.interface import Row
from lorry.server.decoding.rowwise import (
    Doubles,
    Ints,
    deviations,
    draw,
    first_above,
    nth_equal,
    probabilities,
    top_values,
    totals,
)

LISTS = (128, 2048)  # how many of the largest values are tried before a row's whole vocabulary is sorted
TINY = np.float32(1e-30)  # keeps a temperature that float32 would round to 0 a divisor
ALL = np.iinfo(np.int64).max  # top-k off

Cut = Callable[[Left, Tensor], None]
ORDER: tuple[tuple[str, Cut], ...] = (
    ("top_n_sigma", top_n_sigma.cut),
    ("top_k", top_k.cut),
    ("top_p", top_p.cut),
    ("min_p", min_p.cut),
    ("typical_p", typical.cut),
    ("epsilon", epsilon.cut),
    ("eta", eta.cut),
)
OFF = {"top_n_sigma": 0.0, "top_k": ALL, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon": 0.0, "eta": 0.0}


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
    """One cut of some rows. rows: int64 [A], None: all; values: float64 [A], of top-k int64."""

    cut: Cut
    rows: Tensor | None
    values: Tensor


@dataclass(frozen=True)
class Truncation:
    """Vectors over the rows, [R] each, as `OFF` has them where a row lacks the cut. temperature: float32, > 0; top_k:
    int64; the others float64."""

    temperature: NDArray[np.float32]
    top_n_sigma: Doubles
    top_k: Ints
    top_p: Doubles
    min_p: Doubles
    typical_p: Doubles
    epsilon: Doubles
    eta: Doubles

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Truncation:
        """Without mirostat's epsilons, which are no parameters."""
        sampling = [row.sampling for row in rows]
        return cls(
            np.maximum(np.array([each.temperature for each in sampling], np.float32), TINY),
            np.array([each.top_n_sigma for each in sampling], np.float64),
            np.array([each.top_k or ALL for each in sampling], np.int64),
            np.array([each.top_p for each in sampling], np.float64),
            np.array([each.min_p for each in sampling], np.float64),
            np.array([each.typical_p for each in sampling], np.float64),
            np.array([each.epsilon_cutoff for each in sampling], np.float64),
            np.array([each.eta_cutoff for each in sampling], np.float64),
        )

    def __len__(self) -> int:
        return len(self.temperature)

    def __getitem__(self, rows: Ints) -> Truncation:
        return Truncation(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def with_epsilon(self, rows: Sequence[int], values: Doubles) -> Truncation:
        """Mirostat's thresholds put in."""
        changed = self.epsilon.copy()
        changed[rows] = values
        return replace(self, epsilon=changed)

    @property
    def extended(self) -> NDArray[np.bool_]:
        """bool [R], as the function of that name."""
        return (self.typical_p < 1) | (self.epsilon > 0) | (self.eta > 0) | (self.top_n_sigma > 0)

    def used(self, name: str) -> Ints:
        """The rows that have a cut."""
        return np.flatnonzero(getattr(self, name) != OFF[name])

    def arrays(self) -> list[tuple[Cut, Ints | None, NDArray[np.float64] | Ints]]:
        """The stages before they travel."""
        found: list[tuple[Cut, Ints | None, NDArray[np.float64] | Ints]] = []
        for name, cut in ORDER:
            at, values = self.used(name), getattr(self, name)
            if at.size:
                found.append((cut, None, values) if at.size == len(self) else (cut, at, values[at]))
        return found

    def stages(self) -> list[Stage]:
        """What `narrow` takes, on the CPU."""
        return [
            Stage(cut, None if rows is None else torch.from_numpy(rows), torch.from_numpy(values))
            for cut, rows, values in self.arrays()
        ]


def narrow(left: Left, stages: Sequence[Stage]) -> None:
    """Apply the cuts; a row that lacks one is not touched by it."""
    for stage in stages:
        if stage.rows is None:
            stage.cut(left, stage.values)
        else:
            part = left[stage.rows]
            stage.cut(part, stage.values)
            left.put(stage.rows, part)


@dataclass(frozen=True)
class Wholes:
    """Statistics of whole rows, float64 [R] each, NaN where no cut needs them; see `Left`."""

    mass: Doubles
    energy: Doubles
    sigma: Doubles

    @classmethod
    def of(cls, logits: Tensor, cuts: Truncation) -> Wholes:
        """logits: float32 [R, V]. Each is computed for the rows that need it."""
        mass, energy, sigma = np.full((3, len(cuts)), np.nan)
        open_ = (cuts.top_k >= logits.shape[1]) & (cuts.top_n_sigma == 0)
        later = (cuts.typical_p < 1) | (cuts.epsilon > 0) | (cuts.eta > 0)
        with_mass = np.flatnonzero(open_ & ((cuts.top_p < 1) | ((cuts.min_p == 0) & later)))
        surprised = (cuts.typical_p < 1) | ((cuts.epsilon == 0) & (cuts.eta > 0))
        with_energy = open_ & (cuts.top_p == 1) & (cuts.min_p == 0) & surprised
        if with_mass.size:
            mass[with_mass], energy[with_mass] = totals(
                _take(logits, with_mass), cuts.temperature[with_mass], with_energy[with_mass]
            )
        if (at := np.flatnonzero(cuts.top_n_sigma > 0)).size:
            sigma[at] = deviations(_take(logits, at))
        return cls(mass, energy, sigma)

    def left(self, values: NDArray[np.float32], cuts: Truncation, rows: Ints, complete: bool) -> Left:
        """values: float32 [A, C] of `rows`; cuts: theirs."""
        statistics = (torch.from_numpy(each[rows]) for each in (self.mass, self.energy, self.sigma))
        return Left.of(torch.from_numpy(values.copy()), torch.from_numpy(cuts.temperature), complete, *statistics)


def truncated_draw(logits: Tensor, truncation: Truncation, uniform: Doubles) -> Ints:
    """Draw from what the cuts leave.

    logits: float32 [R, V]; uniform: float64 [R] in [0, 1). Returns int64 [R], token ids.
    """
    rows, vocabulary = logits.shape
    wholes = Wholes.of(logits, truncation)
    tokens = np.empty(rows, np.int64)
    undecided = np.arange(rows)
    for count in LISTS:
        part = _take(logits, undecided)
        cuts = truncation[undecided]
        left = wholes.left(top_values(part, count), cuts, undecided, complete=count >= vocabulary)
        narrow(left, cuts.stages())
        exact = left.exact.numpy()
        if (at := np.flatnonzero(exact)).size:
            tokens[undecided[at]] = _falling(_take(part, at), left, at, uniform[undecided[at]])
        undecided = undecided[~exact]
        if not undecided.size:
            return tokens
    for row in undecided.reshape(-1, 1):
        tokens[row] = _sorted_draw(_take(logits, row), truncation[row], uniform[row])
    return tokens


def _sorted_draw(logits: Tensor, cuts: Truncation, uniform: Doubles) -> int:
    """One row by its sorted vocabulary: few come here, and one row's arrays stay in the cache."""
    left = kept(logits, cuts)
    count = int(left.end[0] - left.start[0])
    if cuts.extended[0] and count < LISTS[-1]:
        return int(_falling(logits, left, np.zeros(1, np.int64), uniform)[0])
    low, high = left.bounds()
    p = probabilities(logits, cuts.temperature)
    z = logits[0]
    p[0, : len(z)][(z < low) | (z > high)] = 0.0
    return int(draw(p, uniform)[0])


def kept(logits: Tensor, cuts: Truncation) -> Left:
    """What the cuts leave of float32 [R, V], by sorting it."""
    values = np.sort(logits.numpy(), axis=1)[:, ::-1]
    sigma = deviations(logits) if (cuts.top_n_sigma > 0).any() else np.full(len(cuts), np.nan)
    void = np.full(len(cuts), np.nan)
    left = Wholes(void, void, sigma).left(values, cuts, np.arange(len(cuts)), complete=True)
    narrow(left, cuts.stages())
    return left


def _falling(logits: Tensor, left: Left, rows: Ints, uniform: Doubles) -> Ints:
    """Draw from the windows of `rows` of `left`, whose logits are given, [A, V]. Returns int64 [A]."""
    top = left.values.numpy()[rows]
    start, end = left.start.numpy()[rows, None], left.end.numpy()[rows, None]
    place = np.arange(left.listed)
    inside = np.where((place >= start) & (place < end), left.weights.numpy()[rows], 0.0)
    cumulative = np.cumsum(inside, axis=1)
    rank = first_above(cumulative, uniform * cumulative[:, -1])
    values = top[np.arange(len(rows)), rank]
    nth = rank - np.argmax(top == values[:, None], axis=1)
    return nth_equal(logits, values, nth)


def _take(logits: Tensor, rows: Ints) -> Tensor:
    return logits if len(rows) == len(logits) else logits[torch.from_numpy(rows)]
