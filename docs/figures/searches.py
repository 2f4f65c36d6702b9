"""Draws how searches choose among the sentences of a small Markov chain, by the server's own code: the figures of
docs/decoding-search.md but for guidance and DoLa.

python docs/figures/searches.py        # writes docs/figures/<strategy>.png
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from drawing import BEFORE, BESIDE, DROPPED, KEPT, axes_of, save
from torch import Tensor

from lorry.server.decoding.beam import BeamSearching
from lorry.server.decoding.contrastive import ContrastiveSearching
from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.sampling import Sampling
from lorry.server.engine.messages import FinishReason, Timings
from lorry.server.frontend.best_of import BestOfHandle
from lorry.server.frontend.interface import RequestHandle
from lorry.server.frontend.request import BestOf, Delta, Event, Finished, Request, TokenPrompt, Usage
from lorry.server.params import BeamSearch, ContrastiveSearch, SamplingParams, StoppingParams, TokenLogprobs

Words = tuple[str, ...]

CHAIN = {  # what follows a word, and how likely
    "the": {"lorry": 0.40, "old": 0.33, "driver": 0.17, "bridge": 0.10},
    "old": {"lorry": 0.08, "road": 0.92},
    "lorry": {"waits": 0.38, "stops": 0.34, "turns": 0.28},
    "driver": {"waits": 0.30, "sleeps": 0.70},
    "bridge": {"holds": 0.80, "shakes": 0.20},
    "road": {"ends": 0.85, "turns": 0.15},
    "waits": {"here": 0.45, ".": 0.55},
    "stops": {"here": 0.60, ".": 0.40},
    "turns": {"left": 0.65, ".": 0.35},
    "ends": {"here": 0.60, ".": 0.40},
    "sleeps": {"here": 0.25, ".": 0.75},
    "holds": {".": 1.0},
    "shakes": {".": 1.0},
    "here": {".": 1.0},
    "left": {".": 1.0},
    ".": {".": 1.0},
}
VOCABULARY = list(CHAIN)
LOGITS = torch.tensor([[CHAIN[word].get(other, 0.0) for other in VOCABULARY] for word in VOCABULARY]).log()
THE, END = VOCABULARY.index("the"), VOCABULARY.index(".")

SEARCHES = {
    "beam": BeamSearch(width=3),
    "diverse-beam": BeamSearch(width=4, groups=2, diversity_penalty=1.5),
}
PENALTY_ALPHA = 0.6
CANDIDATES = {"round": 0.58, "on": 0.20, "up": 0.11, "back": 0.07, "down": 0.04}
ANGLES = {"round": 4.0, "on": 103.0, "up": 82.0, "back": -35.0, "down": -70.0}  # degrees, of hidden states
BEHIND = (0.0, 24.0, 8.0, 30.0)  # of "round and round and"
SAMPLED, RETURNED, SEED = 8, 2, 7


def row_of(key: int, output: Sequence[int], **sampling: Any) -> Row:
    """A row behind "the" that puts out words of the chain."""
    stopping = StoppingParams(max_new_tokens=6)
    return Row(key, 0, 0, (THE,), output, SamplingParams(**sampling), stopping, (END,), logprobs=0)


def logits_of(rows: Sequence[Row]) -> Tensor:
    """float32 [R, V]: the chain's, behind the last word of each."""
    return LOGITS[[[*each.prompt_token_ids, *each.output_token_ids][-1] for each in rows]]


def words_of(token_ids: Sequence[int]) -> Words:
    return tuple(VOCABULARY[token] for token in token_ids)


def going_on(strategy: Strategy, rows: Sequence[Row], ways: Sequence[Continuation], keys: Iterator[int]) -> list[Row]:
    """The rows of the next step: the first way of a row keeps its key, the others fork it."""
    following: list[Row] = []
    for parent, own in itertools.groupby(ways, key=lambda way: way.parent):
        for place, way in enumerate(own):
            output = [*rows[parent].output_token_ids, *way.token_ids]
            key = next(keys) if place else rows[parent].key
            following.append(replace(rows[parent], key=key, index=len(following), output_token_ids=output))
            if place:
                strategy.forked(rows[parent].key, key)
    return following


def searched(search: BeamSearch) -> tuple[dict[Words, int], dict[Words, float]]:
    """The beginnings that a search keeps, with the number of their group, and the scores of its answers."""
    strategy, keys = BeamSearching(Processors()), itertools.count()
    rows = [row_of(next(keys), [], n=search.width, search=search)]
    groups: dict[Words, int] = {}
    while True:
        ways = strategy.decide(rows, logits_of(rows))
        if ways[0].final:
            return groups, {words_of(way.token_ids): way.score or 0.0 for way in ways}
        rows = going_on(strategy, rows, ways, keys)
        for place, each in enumerate(rows):  # the first step's ways are those of one group after the other
            words = words_of(each.output_token_ids)
            groups[words] = groups[words[:1]] if len(words) > 1 else place * search.groups // search.width


def heights(beginnings: Sequence[Words]) -> dict[Words, float]:
    """Where each beginning stands: the ends of the tree one below the other, the others amid what follows them."""
    places: dict[Words, float] = {}
    free = itertools.count()

    def stand(words: Words) -> float:
        following = [each for each in beginnings if each[:-1] == words and each]
        places[words] = sum(map(stand, following)) / len(following) if following else float(next(free))
        return places[words]

    stand(())
    return places


def draw_tree(name: str, search: BeamSearch) -> None:
    """Every word that was weighed behind a beginning that was kept, and its probability; behind answers their score."""
    groups, answers = searched(search)
    kept = {words: (KEPT, BEFORE)[groups[words[:1]]] for words in [*groups, *answers]}
    going = [words for words in kept if words[-1] != "."]
    weighed = [(*words, word) for words in [(), *going] for word in CHAIN[("the", *words)[-1]]]
    y = heights(weighed)
    bottom = max(y.values())
    figure, axes = axes_of(0.4 + 0.17 * bottom)
    axes.set(xlim=(-0.3, 5.6), ylim=(bottom + 0.6, -0.6))
    axes.axis("off")
    look = {"fontsize": 7.5, "va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
    axes.text(0, y[()], "the", color=BESIDE, ha="center", **look)
    for words in weighed:
        x, color, width = len(words), kept.get(words, "#999999"), 1.2 if words in kept else 0.7
        before, word = ("the", *words)[-2:]
        said = f"{word.replace('.', 'end')} {CHAIN[before][word]:.2f}"
        axes.plot((x - 1, x), (y[words[:-1]], y[words]), color=color, linewidth=width, zorder=width)
        axes.text(x, y[words], said, color=color, ha="center", **look)
        if words in answers:
            axes.text(x + 0.35, y[words], f"−{-answers[words]:.2f}", weight="bold", **look)
    save(figure, name)


def direction(degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()])


def draw_contrastive() -> None:
    """The candidates of one place, and which of them is taken."""
    search = ContrastiveSearch(top_k=len(CANDIDATES), penalty_alpha=PENALTY_ALPHA)
    strategy, keys = ContrastiveSearching(Processors()), itertools.count()
    behind = torch.stack([direction(angle) for angle in BEHIND])
    states = torch.stack([direction(ANGLES[word]) for word in CANDIDATES])
    p = torch.tensor([list(CANDIDATES.values())])
    rows = [row_of(next(keys), [], search=search)]
    strategy.observe(rows[0].key, behind)
    ways = strategy.decide(rows, p.log(), behind[-1:])
    rows = going_on(strategy, rows, ways, keys)
    chosen = strategy.decide(rows, p.log().expand(len(rows), -1), states)[0].parent

    likely = (1 - PENALTY_ALPHA) * p[0]
    alike = PENALTY_ALPHA * (states @ behind.T).amax(dim=1)
    figure, axes = axes_of(2.0)
    colors = [KEPT if place == chosen else DROPPED for place in range(len(CANDIDATES))]
    places = range(len(CANDIDATES))
    axes.bar(places, likely, color=colors, width=0.5, label="(1 − α) · p")
    axes.bar(places, -alike, color=colors, width=0.5, alpha=0.55, label="−α · largest cosine")
    axes.plot(places, likely - alike, "o", color=BEFORE, markersize=4, label="score, their sum")
    axes.axhline(0, color=BESIDE, linewidth=0.8)
    axes.set(xlabel="behind “round and round and”")
    axes.set_xticks(places, list(CANDIDATES))
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, "contrastive")


async def sampled(rows: Sequence[Row]) -> AsyncIterator[Event]:
    """Each row's sentence, as the engine's client tells of it."""
    strategy = Sampling()
    for each in rows:
        output, reports = list[int](), list[TokenLogprobs]()
        growing = replace(each, output_token_ids=output)
        while END not in output:
            (way,) = strategy.decide([growing], logits_of([growing]))
            output += way.token_ids
            reports += way.logprobs or ()
        yield Delta(each.index, " ".join(words_of(output)), tuple(output), tuple(reports))
        yield Finished(each.index, FinishReason.EOS, "", Usage(1, 0, len(output)), Timings())


async def ranked() -> list[tuple[str, float]]:
    """All sentences and their scores, as best of n returns them, the best first."""
    rows = [replace(row_of(index, [], n=SAMPLED, seed=SEED), index=index) for index in range(SAMPLED)]
    request = Request(prompt=TokenPrompt((THE,)), sampling=rows[0].sampling, best_of=BestOf(SAMPLED))
    events = [event async for event in BestOfHandle(cast("RequestHandle", sampled(rows)), request)]
    texts = [event.text for event in events if isinstance(event, Delta)]
    return list(zip(texts, [event.score or 0.0 for event in events if isinstance(event, Finished)], strict=True))


def draw_best_of() -> None:
    found = asyncio.run(ranked())
    figure, axes = axes_of(2.0)
    colors = [KEPT if place < RETURNED else DROPPED for place in range(len(found))]
    axes.barh(range(len(found)), [score for _, score in found], color=colors, height=0.7)
    axes.set(ylim=(len(found) - 0.4, -0.6), xlim=(0, 1.05 * found[-1][1]), xlabel="mean of log p")
    axes.set_yticks(range(len(found)), [f"the {text}".replace(" .", ".") for text, _ in found])
    save(figure, "best-of")


def main() -> None:
    for name, search in SEARCHES.items():
        draw_tree(name, search)
    draw_contrastive()
    draw_best_of()


if __name__ == "__main__":
    main()
