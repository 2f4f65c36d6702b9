"""What a step is to reach."""

from __future__ import annotations

from gpu.goals import Goal, Row


def _decode(row: Row, rows: int, mix: str) -> bool:
    return (row["op"], row["rows"], row["shape"]) == ("decode", rows, mix)


def _part(row: Row, name: str) -> float | None:
    """Microseconds of a part over those of the whole."""
    part, whole = row.get("parts", {}).get(name), row.get("microseconds")
    return part / whole if part and whole else None


def _alone(row: Row) -> float | None:
    return row.get("times_bytes_bound") if _decode(row, 1, "no adapter") else None


def _eight(row: Row) -> float | None:
    return row.get("times_bytes_bound") if _decode(row, 64, "8 adapters of rank 16") else None


def _one(row: Row) -> float | None:
    without = _part(row, "without adapters") if _decode(row, 64, "1 adapter of rank 16") else None
    return 1 / without - 1 if without else None


def _idle(row: Row) -> float | None:
    apart = row["op"] == "step apart" and row["rows"] == 16
    busy = _part(row, "busy") if apart and row["shape"] in ("no adapter", "8 adapters of rank 16") else None
    return max(0.0, 1 - busy) if busy else None


def _bystanders(row: Row) -> float | None:
    quiet = _part(row, "quiet p99") if row["op"] == "bystanders" else None
    return 1 / quiet - 1 if quiet else None


GOALS = (
    Goal("decode step, batch 1, 1k context, over its bytes bound", 2.0, 1.4, 1, _alone, at_most=True),
    Goal("decode step, batch 64, 8 distinct adapters, over its bytes bound", 1.8, 1.3, 1, _eight, at_most=True),
    Goal("the same with 1 adapter against none, more time", 0.10, 0.03, 1, _one, at_most=True, unit="%"),
    Goal("share of the step in which the GPU is idle, batch 16", 0.10, 0.03, 2, _idle, at_most=True, unit="%"),
    Goal("bystanders' p99 latency while adapters load, more", 0.10, 0.03, 1, _bystanders, at_most=True, unit="%"),
)
