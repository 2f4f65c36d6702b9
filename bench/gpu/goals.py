"""What the kernels are to reach on an H100: floors, aims, and which figures they are read from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # a Figure's report


@dataclass(frozen=True)
class Goal:
    """A line of the table. value: of a row, None where the row does not count; the worst of all rows is measured.

    expected: how many rows the goal speaks of: with fewer, it is not yet measured. at_most: whether less is better.
    """

    text: str
    floor: float
    aim: float
    expected: int
    value: Callable[[Row], float | None]
    at_most: bool = False
    floor_is_open: bool = False  # to be passed, not only reached
    unit: str = ""

    def measured(self, rows: Iterable[Row]) -> float | None:
        values = [value for row in rows if (value := self.value(row)) is not None]
        if len(values) < self.expected:
            return None
        return max(values) if self.at_most else min(values)

    def verdict(self, measured: float | None) -> str:
        """ "not yet measured", "below the floor", "floor" or "aim": what was reached."""
        if measured is None:
            return "not yet measured"
        better, closed = (operator.lt, operator.le) if self.at_most else (operator.gt, operator.ge)
        if closed(measured, self.aim):
            return "aim"
        return "floor" if (better if self.floor_is_open else closed)(measured, self.floor) else "below the floor"

    def show(self, value: float | None) -> str:
        if value is None:
            return "not yet measured"
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}x"


def _large(row: Row) -> bool:
    return row["op"] == "nf4_linear" and row["shape"].split()[0] in ("gate_up", "down")


def _bandwidth(row: Row) -> float | None:
    return row.get("of_copy") if _large(row) and row["rows"] <= 16 else None


def _bitsandbytes(row: Row) -> float | None:
    ratios = [ratio for name, ratio in row.get("faster_than", {}).items() if name.startswith("bitsandbytes")]
    return min(ratios) if ratios and _large(row) and row["rows"] <= 64 else None


def _prefill(row: Row) -> float | None:
    if row["op"] != "nf4_linear" or row["rows"] != 4096:
        return None
    ratio = row.get("faster_than", {}).get("bf16 F.linear")
    return 1 / ratio if ratio else None


def _lora(row: Row) -> float | None:
    wanted = row["op"] == "lora in a layer" and row["shape"].startswith("8 adapters") and row["rows"] in (16, 64)
    return row.get("times_bytes_bound") if wanted else None


def _decode(row: Row) -> float | None:
    return row.get("of_copy") if row["op"] == "attention decode" and row["shape"] == "16 sequences of 4096" else None


GOALS = (
    Goal(
        "nf4_linear gate_up and down of Llama-3-8B, M <= 16, of the copy bandwidth",
        0.60,
        0.80,
        10,
        _bandwidth,
        unit="%",
    ),
    Goal("the same against bitsandbytes >= 0.50, every M in 1..64", 1.0, 2.0, 14, _bitsandbytes, floor_is_open=True),
    Goal("nf4_linear, M = 4096, time over that of bf16 cuBLAS", 1.25, 1.10, 4, _prefill, at_most=True),
    Goal(
        "LoRA part, 8 distinct rank-16 adapters, batch 16 and 64, over its bytes bound",
        2.0,
        1.3,
        2,
        _lora,
        at_most=True,
    ),
    Goal("paged decode attention, 16 sequences of 4k, of the copy bandwidth", 0.65, 0.80, 1, _decode, unit="%"),
)


def evaluate(rows: list[Row], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """One entry for each goal, with what was measured and whether the floor or the aim was reached."""
    found = []
    for goal in goals:
        measured = goal.measured(rows)
        found.append(
            {
                "goal": goal.text,
                "floor": f"{'<= ' if goal.at_most else '> ' if goal.floor_is_open else '>= '}{goal.show(goal.floor)}",
                "aim": f"{'<= ' if goal.at_most else '>= '}{goal.show(goal.aim)}",
                "measured": measured,
                "shown": goal.show(measured),
                "reached": goal.verdict(measured),
            }
        )
    return found
