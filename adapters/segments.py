"""From runs of batch rows to the segments that `lora_add` reads.

starts[s] … starts[s+1]: rows of segment s        slots[s, :], weights[s, :]: its combo, padded with -1 and 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from lorry.kernels.lora import Segments

Combo = tuple[tuple[int, float], ...]
"""(slot of a resident adapter, weight) each; () is the base."""


def build_segments(runs: Iterable[tuple[int, Combo]]) -> Segments:
    """Segments over the whole flat batch from (rows, combo) runs in the batch's order.

    Runs of no rows vanish, neighbours of one combo become one segment, rows of the base are a segment without slots.
    starts: int32 [S+1] from 0 to the batch's rows; slots: int32 [S, J]; weights: float32 [S, J].
    """
    starts = [0]
    combos: list[Combo] = []
    for rows, combo in runs:
        assert rows >= 0
        if rows == 0:
            continue
        if combos and combos[-1] == combo:
            starts[-1] += rows
        else:
            combos.append(combo)
            starts.append(starts[-1] + rows)
    width = max(map(len, combos), default=0)
    padding = ((-1, 0.0),)
    padded = [combo + padding * (width - len(combo)) for combo in combos]
    return Segments(
        starts=torch.tensor(starts, dtype=torch.int32),
        slots=torch.tensor([[slot for slot, _ in row] for row in padded], dtype=torch.int32).view(len(combos), width),
        weights=torch.tensor([[w for _, w in row] for row in padded], dtype=torch.float32).view(len(combos), width),
    )


def rows_of(segments: Segments, first: int, last: int) -> Segments:
    """The segments of rows [first, last) alone; those without rows there are empty."""
    return replace(segments, starts=segments.starts.clamp(first, last) - first)
