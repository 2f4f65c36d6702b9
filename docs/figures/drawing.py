"""What the figures of docs/ share: their look, the example distribution, and the file that each becomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

mpl.use("Agg")

from matplotlib import pyplot

FOLDER = Path(__file__).parent
KEPT, DROPPED, BEFORE, BESIDE = "#3b6fb6", "#d8d8d8", "#d1603d", "#222222"
TOKENS = 24
HEAD = (4.2, 3.3, 3.1, 2.6, 2.4, 2.3, 2.0, 1.9, 1.5, 1.2, 1.0, 0.9)
LOGITS = torch.tensor([[*HEAD, *np.linspace(0.6, -2.6, TOKENS - len(HEAD)).tolist()]])


def axes_of(height: float = 1.7, panels: int = 1) -> tuple[Any, Any]:
    """A figure and its axes; of several panels, one above the other, a list of them."""
    figure, axes = pyplot.subplots(panels, figsize=(6.4, height), sharex=True, constrained_layout=True)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.png", dpi=75, metadata={"Software": None})
    pyplot.close(figure)


def probabilities(logits: Tensor) -> list[float]:
    """softmax of float32 [1, V]."""
    return torch.softmax(logits, 1)[0].tolist()


def bars(axes: Any, p: Sequence[float], left: Sequence[bool], label: str = "p") -> None:
    """One bar for each token, blue where it is left."""
    colors = [KEPT if each else DROPPED for each in left]
    axes.bar(range(TOKENS), p, color=colors, width=0.8)
    axes.set(ylabel=label, xlim=(-0.7, TOKENS - 0.3))
    axes.set_xticks(range(0, TOKENS, 2))


def dots(axes: Any, p: Sequence[float], label: str, color: str = BEFORE) -> None:
    """Another distribution over the same tokens."""
    axes.plot(range(TOKENS), p, "o", color=color, markersize=2.5, label=label)
