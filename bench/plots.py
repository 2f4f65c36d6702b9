"""The plots of a result of `adapters.py`: throughput, hits, first tokens and bystanders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot

COLORS = {"uniform": "#3b6fb6", "zipf": "#d1603d"}
PLACES = {"hot": "on the device", "warm": "in host memory", "cold": "on disk"}
HOT_AND_COLD = (("hot", "#3b6fb6"), ("warm", "#8aa84b"), ("cold", "#d1603d"))


def draw(result: dict[str, Any], target: Path) -> None:
    """One picture of four plots."""
    rows = result["registered"]
    figure, ((throughput, hits), (first, gaps)) = pyplot.subplots(2, 2, figsize=(10, 7.5), constrained_layout=True)
    _lines(throughput, rows, lambda row: row["tokens_per_second"])
    throughput.set(title=f"{result['workload']['streams']} streams, room for {result['pool']} adapters")
    throughput.set(ylabel="output tokens/s", ylim=(0, None))
    _lines(hits, rows, lambda row: 100 * row["hit_rate"])
    hits.set(title="requests whose adapter was on the device", ylabel="%", ylim=(0, 102))
    _first_tokens(first, [row for row in rows if row["popularity"] == "zipf"])
    _bystanders(gaps, result["bystanders"])
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _lines(axes: Any, rows: Sequence[dict[str, Any]], value: Any) -> None:
    for popularity, color in COLORS.items():
        chosen = [row for row in rows if row["popularity"] == popularity]
        counts = [row["adapters"] for row in chosen]
        axes.plot(counts, [value(row) for row in chosen], "o-", color=color, label=popularity)
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("registered adapters")
    axes.grid(alpha=0.3)
    axes.legend()


def _first_tokens(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, color in HOT_AND_COLD:
        for percentile, style in (("p50", "o-"), ("p99", "o--")):
            found = [
                (row["adapters"], row["time_to_first_token_ms"][place][percentile])
                for row in rows
                if row["time_to_first_token_ms"][place]
            ]
            if found:
                axes.plot(*zip(*found, strict=True), style, color=color, label=f"{PLACES[place]}, {percentile}")
    axes.set(xscale="log", title="time to first token, zipf", xlabel="registered adapters", ylabel="ms", ylim=(0, None))
    axes.set_xticks([row["adapters"] for row in rows], [f"{row['adapters']:,}" for row in rows], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _bystanders(axes: Any, found: dict[str, Any]) -> None:
    for offset, (name, label, color) in enumerate(
        (("quiet_ms", "quiet", "#3b6fb6"), ("loading_ms", "while adapters load", "#d1603d"))
    ):
        values = found[name]
        places = [number + 0.38 * offset for number in range(len(values))]
        axes.bar(places, list(values.values()), width=0.36, color=color, label=label)
    axes.set_xticks([number + 0.19 for number in range(len(found["quiet_ms"]))], list(found["quiet_ms"]))
    axes.set(title=f"inter-token latency of bystanders, {found['loads']} loads", ylabel="ms")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
