"""Draws what a grammar leaves of a distribution and what prompt lookup saves in a text, by the server's own code: the
figures of docs/structured-output.md and docs/decoding-speculation.md.

python docs/figures/texts.py        # writes docs/figures/grammar.png and speculation.png
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from drawing import BEFORE, BESIDE, DROPPED, KEPT, LOGITS, TOKENS, axes_of, bars, dots, probabilities, save
from llguidance import LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorry.server.decoding.grammar import Grammar
from lorry.server.decoding.interface import Row
from lorry.server.decoding.sampling import Sampling
from lorry.server.decoding.speculation.strategy import Speculating
from lorry.server.grammars.library import Library
from lorry.server.params import SamplingParams, Speculation, StoppingParams, StructuredOutput

VOCABULARY = (
    *('"', "4", "four", "42", " ", "null", "{", "-", "0", "4}", "5.", "["),
    *("true", ",", "}", "07", "18", "e", ':"', '{"', "age", '":', "$", "end"),
)
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
BEGINNING = ('{"', "age", '":')
STEPS = {
    "": LOGITS,
    "4": LOGITS[:, [10, 4, 17, 5, 7, 15, 18, 14, 9, 8, 3, 20, 19, 1, 0, 11, 6, 2, 12, 21, 22, 13, 16, 23]],
}

PROMPT = "change Leeds to York : the lorry left Leeds at six , took coal from Leeds to Hull and came home at ten ."
ANSWER = "the lorry left York at six , took coal from York to Hull and came home at ten ."
DRAFT = 5
WIDTH = 86  # characters in a line
ONE_BY_ONE, ACCEPTED, REJECTED = "one by one", "proposed, kept", "proposed, dropped"
LOOKS = {ONE_BY_ONE: (DROPPED, BESIDE), ACCEPTED: (KEPT, "white"), REJECTED: ("#f6ded5", BEFORE)}


def vocabulary() -> LLTokenizer:
    """A byte-level tokenizer of these few tokens; "end" ends an answer."""
    space = {token.replace(" ", "Ġ"): place for place, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(vocab=space, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return LLTokenizer(backend.to_str(), n_vocab=TOKENS, eos_token=[VOCABULARY.index("end")])


def draw_grammar() -> None:
    """Two steps of an answer: what is allowed, as bars, and the model's own distribution as dots."""
    grammar = Grammar(Library(vocabulary()), TOKENS)
    sampling = SamplingParams(structured_output=StructuredOutput("json_schema", json.dumps(SCHEMA)))
    figure, panels = axes_of(3.0, len(STEPS))
    for key, (axes, (behind, logits)) in enumerate(zip(panels, STEPS.items(), strict=True)):
        output = [VOCABULARY.index(token) for token in (*BEGINNING, *behind)]
        row = Row(key, key, 0, (), output, sampling, StoppingParams(99), (VOCABULARY.index("end"),))
        masked = logits.clone()
        grammar.apply([row], [0], masked)
        bars(axes, probabilities(masked), (masked[0] > -torch.inf).tolist())
        dots(axes, probabilities(logits), "before")
        axes.legend(fontsize=8, frameon=False, title=f"behind  {''.join(BEGINNING)}{behind}", title_fontsize=8)
    panels[-1].set_xticks(range(TOKENS), [token.replace(" ", "␣") for token in VOCABULARY], fontsize=7.5)
    save(figure, "grammar")


def spoken() -> list[list[tuple[str, str]]]:
    """The steps of a greedy answer: its tokens, and those that were proposed in vain, each with what became of it."""
    words = sorted({*PROMPT.split(), *ANSWER.split()})
    prompt, answer = ([words.index(word) for word in text.split()] for text in (PROMPT, ANSWER))
    strategy = Speculating(Sampling(), Grammar(None, len(words)))
    sampling = SamplingParams(temperature=0.0, speculation=Speculation("prompt_lookup", DRAFT, adaptive=False))
    output: list[int] = []
    steps: list[list[tuple[str, str]]] = []
    while len(output) < len(answer):
        row = Row(0, 0, 0, prompt, output, sampling, StoppingParams(len(answer)))
        draft = strategy.look_up(row, strategy.room(row, 0.0, DRAFT))
        row = Row(0, 0, 0, prompt, output, sampling, StoppingParams(len(answer)), draft_token_ids=draft)
        wanted = torch.tensor([*answer, 0][len(output) : len(output) + len(draft) + 1])
        logits = torch.nn.functional.one_hot(wanted, len(words)).float()
        (way,) = strategy.decide([row], logits)
        accepted = way.accepted or 0
        steps.append([(words[token], ACCEPTED) for token in way.token_ids[:accepted]])
        steps[-1] += [(words[token], REJECTED) for token in draft[accepted:]]
        steps[-1].append((words[way.token_ids[-1]], ONE_BY_ONE))
        output += way.token_ids
    return steps


def strip(axes: Any, pieces: Sequence[tuple[str, str]], x: float, y: float) -> float:
    """Words in boxes, side by side from x on, with a line below; where they end. A unit of x is a character."""
    start = x
    for word, look in pieces:
        fill, ink = LOOKS[look]
        width = len(word) + 1.0
        axes.barh(y, width, left=x, height=0.7, color=fill)
        axes.text(
            x + width / 2, y, word, color=ink, fontsize=7.5, family="monospace", ha="center", va="center_baseline"
        )
        x += width + 0.3
    axes.plot((start, x - 0.3), (y + 0.5, y + 0.5), color=BESIDE, linewidth=0.8)
    return x


def draw_speculation() -> None:
    """The prompt, and below it the answer, one line under the words that a step ran."""
    steps = spoken()
    figure, axes = axes_of(1.8)
    axes.axis("off")
    lines = textwrap.wrap(PROMPT, WIDTH)
    for number, line in enumerate(lines):
        axes.text(0, number, line, color=BESIDE, fontsize=7.5, family="monospace", va="center_baseline")
    x, y = 0.0, len(lines) + 0.4
    for step in steps:
        if x + sum(len(word) + 1.3 for word, _ in step) > WIDTH:
            x, y = 0.0, y + 1.4
        x = strip(axes, step, x, y) + 0.9
    tokens = sum(look != REJECTED for step in steps for _, look in step)
    x, y = 0.0, y + 1.9
    for look in LOOKS:
        x = strip(axes, [(look, look)], x, y) + 0.9
    axes.text(x + 1, y, f"{tokens} tokens in {len(steps)} steps", fontsize=8, va="center_baseline")
    axes.set(xlim=(-0.2, WIDTH), ylim=(y + 0.8, -0.6))
    save(figure, "speculation")


def main() -> None:
    draw_grammar()
    draw_speculation()


if __name__ == "__main__":
    main()
