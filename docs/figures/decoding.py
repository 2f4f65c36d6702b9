"""Draws what each strategy does to one example distribution, by the server's own code: the figures of docs/decoding.md,
and those of guidance and DoLa in docs/decoding-search.md.

python docs/figures/decoding.py        # writes docs/figures/<strategy>.png
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from drawing import BEFORE, BESIDE, KEPT, LOGITS, TOKENS, axes_of, bars, dots, probabilities, save

from lorry.server.decoding.dola import contrasted, divergence
from lorry.server.decoding.guidance import guided
from lorry.server.decoding.interface import Row
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.sampling import Sampling
from lorry.server.decoding.truncation import Truncation, kept
from lorry.server.params import Dry, Mirostat, SamplingParams, StoppingParams

CUTS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 6},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.15},
    "typical-p": {"typical_p": 0.4},
    "epsilon": {"epsilon_cutoff": 0.03},
    "eta": {"eta_cutoff": 0.03},
    "top-n-sigma": {"top_n_sigma": 1.0},
}
CHANGES: dict[str, dict[str, Any]] = {
    "logit-bias": {"logit_bias": {1: -2.0, 9: 2.0}},
    "repetition": {"repetition_penalty": 1.5},
    "presence-frequency": {"presence_penalty": 0.4, "frequency_penalty": 0.4},
    "dry": {"dry": Dry(0.8, allowed_length=1)},
    "no-repeat-ngram": {"no_repeat_ngram_size": 2},
    "bad-words": {"bad_words": ((2,), (5, 3), (8, 4))},
    "min-tokens": {"minimum": 9},
    "allowed-tokens": {"allowed_token_ids": (0, 3, 7, 12)},
}
TEXT = (6, 3, 0, 2, 2, 8, 6, 3, 1, 6, 3, 0, 2, 2, 5)  # what the penalties look at: prompt, then output from PROMPT on
PROMPT = 6
SCALE = 2.0  # of guidance
STEPS = torch.arange(TOKENS, dtype=torch.float32)
NEGATIVE = LOGITS + 1.1 * torch.sin(1.9 * STEPS + 0.9)  # what another prompt, or the base, would say
LAYERS = (2, 4, 6)
EARLY = torch.stack([0.1 * layer * LOGITS[0] + torch.cos((0.6 + layer / 4) * STEPS) for layer in LAYERS])


def row_of(minimum: int = 0, **options: Any) -> Row:
    stopping = StoppingParams(99, min_new_tokens=minimum + (len(TEXT) if minimum else 0))
    text = TEXT if minimum or "bad_words" in options else (*TEXT, *TEXT[:2])
    return Row(0, 0, 0, text[:PROMPT], text[PROMPT:], SamplingParams(**options), stopping, eos_token_ids=(1,))


def draw_cut(name: str, options: dict[str, Any]) -> None:
    """The distribution, and in blue what is left."""
    low, high = kept(LOGITS, Truncation.of([row_of(**options)])).bounds()
    p = torch.softmax(LOGITS, 1)[0]
    left = ((low <= LOGITS) & (high >= LOGITS))[0]
    figure, axes = axes_of()
    bars(axes, p.tolist(), left.tolist())
    said = ", ".join(f"{key} = {value}" for key, value in options.items())
    axes.set_title(f"{said}: {int(left.sum())} of {TOKENS} tokens, {float(p[left].sum()):.0%}", fontsize=9)
    save(figure, name)


def draw_change(name: str, options: dict[str, Any]) -> None:
    """Probabilities behind a processor; as dots, those before it."""
    changed = LOGITS.clone()
    Processors().apply([row_of(**options)], changed)
    figure, axes = axes_of()
    bars(axes, probabilities(changed), (changed[0] > -torch.inf).tolist())
    dots(axes, probabilities(LOGITS), "before")
    axes.legend(fontsize=8, frameon=False)
    save(figure, name)


def draw_temperature() -> None:
    figure, axes = axes_of()
    for temperature, color in ((0.5, "#7aa6d8"), (1.0, KEPT), (2.0, BEFORE)):
        p = probabilities(LOGITS / temperature)
        axes.plot(range(TOKENS), p, ".-", color=color, label=f"T = {temperature:g}", linewidth=1)
    axes.set(ylabel="p", xlim=(-0.7, TOKENS - 0.3))
    axes.legend(fontsize=8, frameon=False)
    save(figure, "temperature")


def draw_mirostat() -> None:
    """A sequence of draws over a distribution that grows flat and steep again."""
    settings, steps = Mirostat(tau=2.5, eta=0.2), 160
    output: list[int] = []
    row = Row(0, 0, 0, (), output, SamplingParams(seed=3, mirostat=settings), StoppingParams(999))
    strategy, thresholds, surprises = Sampling(), [], []
    for step in range(steps):
        logits = LOGITS * (1.0 + 0.35 * np.sin(step / 25))
        thresholds.append(-float(np.log2(strategy.mirostat.epsilon([row])[0])))
        (token,) = strategy.decide([row], logits.clone())[0].token_ids
        surprises.append(-float(torch.log_softmax(logits, 1)[0, token]) / np.log(2))
        output.append(token)
    figure, axes = axes_of(2.0)
    axes.plot(surprises, ".", color=KEPT, markersize=3, label="surprise of the token")
    axes.plot(thresholds, color=BEFORE, linewidth=1, label="μ")
    axes.axhline(settings.tau, color="#888888", linewidth=0.8, linestyle="--", label="τ")
    axes.set(ylabel="bits", xlabel="token", xlim=(0, steps))
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="upper right")
    save(figure, "mirostat")


def draw_guidance() -> None:
    figure, axes = axes_of()
    mixed = guided(LOGITS, NEGATIVE, torch.tensor([SCALE]))
    bars(axes, probabilities(mixed), [True] * TOKENS, "p'")
    dots(axes, probabilities(LOGITS), "p, behind the prompt")
    dots(axes, probabilities(NEGATIVE), "n, behind the negative prompt", BESIDE)
    axes.legend(fontsize=8, frameon=False, title=f"scale = {SCALE:g}", title_fontsize=8)
    save(figure, "guidance")


def draw_dola() -> None:
    figure, axes = axes_of()
    early = int(divergence(LOGITS[0].log_softmax(0), EARLY.log_softmax(1)).argmax())
    said = f"that of layer {LAYERS[early]}, of {', '.join(map(str, LAYERS))} the least like it"
    bars(axes, probabilities(contrasted(LOGITS[0], EARLY)[None]), [True] * TOKENS)
    dots(axes, probabilities(LOGITS), "the model's own")
    dots(axes, probabilities(EARLY[early : early + 1]), said, BESIDE)
    axes.legend(fontsize=8, frameon=False)
    save(figure, "dola")


def main() -> None:
    draw_temperature()
    draw_mirostat()
    draw_guidance()
    draw_dola()
    for name, options in CUTS.items():
        draw_cut(name, options)
    for name, options in CHANGES.items():
        draw_change(name, options)


if __name__ == "__main__":
    main()
