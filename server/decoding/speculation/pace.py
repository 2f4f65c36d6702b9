"""How many tokens to propose: as many as pay.

A step over x tokens takes α + β·x seconds. In a step of R tokens without proposals, one more costs the share

    c = β·R / (α + β·R)

of what each of the R tokens is worth, so a proposal pays while it is accepted with a probability of at least c, and a
draft model's while that is at least c plus the share of the step that the model itself takes. With the acceptance a,
as seen so far, the j-th proposal is accepted with a^j:

    length = the largest j with a^j ≥ c,   0: nothing pays

Where nothing pays, a row rests for some tokens, then tries again with a few, and rests twice as long if that fails.
Only time depends on all this: which tokens come out does not. α and β come from the steps themselves.

The rule is the greatest throughput of Liu et al. 2024 (TurboSpec, goodput), for one row at the margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FADING = 0.9  # of what was seen, with each proposal
CONFIDENCE = 4.0  # tokens that the acceptance of other rows counts for
FIRST_ACCEPTANCE = 0.7
LEAST, MOST = 0.01, 0.99  # acceptance that is believed
PROBE = 3  # tokens after a rest
REST, LONGEST_REST = 16, 256  # tokens
FORGETTING = 0.98  # of a step's time, with each step
FIRST_SHARE = 0.05  # β / α before steps of several lengths were seen


@dataclass(slots=True)
class Seen:
    """Of one row. until: length of its output from which it may try again; rest: tokens that it rested for last;
    hopeless: nothing would have paid at the last look, even if all of it came."""

    hits: float = 0.0
    misses: float = 0.0
    until: int = 0
    rest: int = 0
    hopeless: bool = False

    def add(self, hits: int, misses: int) -> None:
        self.hits = FADING * self.hits + hits
        self.misses = FADING * self.misses + misses


class StepTimes:
    """A line through the times of steps, by least squares in which older steps count less."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # of 1, x, y, x², xy

    def saw(self, tokens: int, seconds: float) -> None:
        self._sums = FORGETTING * self._sums + (1, tokens, seconds, tokens * tokens, tokens * seconds)

    def share(self, tokens: int, seconds: float = 0.0) -> float:
        """c of a step with this many tokens, and the part of it that `seconds` are."""
        base, slope = self._line() or (1.0, FIRST_SHARE)
        step = base + slope * tokens
        return (slope * tokens + (seconds if self._line() else 0.0)) / step

    def _line(self) -> tuple[float, float] | None:
        """α, β in seconds; None: too little was seen."""
        count, x, y, xx, xy = self._sums.tolist()
        spread = count * xx - x * x
        if count < 4 or spread < 1e-3 * count * count:
            return None
        slope = max(0.0, (count * xy - x * y) / spread)
        return max(1e-9, (y - slope * x) / count), slope


class Pace:
    """The rows' acceptance, and how many tokens each may propose."""

    def __init__(self) -> None:
        self._rows: dict[int, Seen] = {}
        self._all = Seen()

    def length(self, key: int, place: int, share: float, most: int) -> int:
        """For a row whose output has `place` tokens; `share` as above, with what proposing itself takes."""
        seen = self._rows.setdefault(key, Seen())
        if place < seen.until:
            return 0
        rate = self.acceptance(key)
        seen.hopeless = share >= MOST
        length = most if share <= 0 else min(most, int(math.log(share) / math.log(rate))) if share < 1 else 0
        if length > 0:
            seen.rest = 0
            return length
        if seen.rest == 0:
            self._rest(seen, place)
            return 0
        return min(most, PROBE)

    def rests(self, key: int, place: int) -> bool:
        """Whether the row will propose nothing at that length."""
        seen = self._rows.get(key)
        return seen is not None and place < seen.until

    def saw(self, key: int, place: int, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens behind an output of `place` tokens the first `accepted` were right."""
        seen = self._rows.setdefault(key, Seen())
        hits, misses = accepted, int(accepted < proposed)
        seen.add(hits, misses)
        self._all.add(hits, misses)
        if seen.rest and (misses or seen.hopeless):
            self._rest(seen, place)

    def acceptance(self, key: int) -> float:
        """a of a row, within (0, 1)."""
        seen, every = self._rows.get(key, Seen()), self._all
        prior = (every.hits + FIRST_ACCEPTANCE) / (every.hits + every.misses + 1)
        rate = (seen.hits + CONFIDENCE * prior) / (seen.hits + seen.misses + CONFIDENCE)
        return min(max(rate, LEAST), MOST)

    def release(self, key: int) -> None:
        self._rows.pop(key, None)

    @staticmethod
    def _rest(seen: Seen, place: int) -> None:
        seen.rest = min(LONGEST_REST, 2 * seen.rest or REST)
        seen.until = place + seen.rest
