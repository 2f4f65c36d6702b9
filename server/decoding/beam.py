"""Beam search: the most likely answers, found by keeping the most likely beginnings; and diverse beam search.

    s(y) = Σ log p(y[t] | prompt, y[<t])        score(y) = s(y) / |y| ** length_penalty

p is what the processors leave of softmax(logits); as in transformers they change log p, and what they leave is not
normalised again. A step, from `width` beams (from one behind the prompt):

    candidates   the width · max(2, 1 + e) largest s of beams × vocabulary; e tokens end an answer
    finished     those of the first `width` candidates that end; the `width` best scores of all steps are kept
    beams        the first `width` candidates that do not end

It is over at max_new_tokens, where all of the first `width` candidates are finished, or when `width` answers are
finished and, b being the best beam and t its length,

    HEURISTIC   s(b) / t ** length_penalty                                          is no better than the worst of them
    FIRST
    NEVER       s(b) / max_new_tokens ** length_penalty, where that is positive, else as HEURISTIC, is no better

That is transformers' `num_beams`, with `early_stopping` False, True and "never". A token of probability 0 is never
taken, so fewer beams than `width` may be alive, and fewer answers than asked for exist, where processors forbid most of
the vocabulary.

Diverse (Vijayakumar et al. 2016, arXiv:1610.02424): the beams are `groups` searches of width / groups beams. They take
their steps one after the other, each with

    log p(v) - diversity_penalty · (how many beams of the groups before it went on or finished with v in this step)

in place of log p(v), which s and the score then hold. The answers of all groups are ranked together. A group that is
over lets the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.decoding.largest import largest
from lorry.server.decoding.logprobs import token_logprobs
from lorry.server.decoding.min_tokens import ending
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.scatter import Ids
from lorry.server.params import BeamSearch, EarlyStopping, TokenLogprobs

History = tuple["History", TokenLogprobs] | None  # of a beam's tokens, the last first; beginnings are shared


@dataclass(frozen=True, slots=True, eq=False)
class Beam:
    """A beginning. score: s of it; group: which search of a diverse one it is in."""

    group: int
    score: np.float32
    history: History = None


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A finished answer and its score."""

    score: np.float32
    token_ids: tuple[int, ...]
    history: History

    def final(self) -> Continuation:
        logprobs = tuple(reversed(list(_unrolled(self.history)))) if self.history is not None else None
        return Continuation(0, self.token_ids, logprobs, final=True, score=float(self.score))


@dataclass(slots=True, eq=False)
class Candidate:
    """One beam and a token behind it."""

    parent: int  # row of the search
    token_id: int
    score: np.float32
    history: History = None


@dataclass(slots=True, eq=False)
class Group:
    """One search of a diverse one. finished: its answers, the best first."""

    finished: list[Answer] = field(default_factory=list)
    over: bool = False


class Search:
    """One request's beams and answers. beams: by key of their sequence; forks: beams of forks to come, by parent."""

    def __init__(self, parameters: BeamSearch, first: Row) -> None:
        self.parameters = parameters
        self.width = parameters.width // parameters.groups
        self.groups = [Group() for _ in range(parameters.groups)]
        self.beams: dict[int, Beam] = {}
        self.forks: dict[int, list[Beam]] = {}
        self.decided = -1, list[Continuation]()  # tokens of the output then, and what was decided
        self.most = first.stopping.max_new_tokens
        self.answers = first.sampling.n

    def score(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(float(length) ** self.parameters.length_penalty))

    def is_over(self, group: Group, beams: Sequence[Candidate], length: int) -> bool:
        """Whether a group ends that has `beams`, the best first, of `length` tokens left."""
        if not beams or len(group.finished) < self.width:
            return not beams
        if self.parameters.early_stopping is EarlyStopping.FIRST:
            return True
        if self.parameters.early_stopping is EarlyStopping.NEVER and self.parameters.length_penalty > 0:
            length = self.most
        return not self.score(beams[0].score, length) > group.finished[-1].score

    def finals(self) -> list[Continuation]:
        """The best answers of all groups."""
        ranked = sorted((answer for group in self.groups for answer in group.finished), key=lambda each: -each.score)
        if not ranked:
            raise ValueError("no token has a probability above 0")
        return [answer.final() for answer in ranked[: self.answers]]


class BeamSearching(Strategy):
    """The strategy of requests whose search is a `BeamSearch`."""

    def __init__(self, processors: Processors) -> None:
        self.processors = processors
        self._searches: dict[int, Search] = {}  # by key of each sequence

    @torch.inference_mode()
    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """`width` continuations for each search, whose whole output is held, or its finals. Changes no logits."""
        scores = torch.log_softmax(logits, dim=1)
        self.processors.apply(rows, scores)
        continuations: list[Continuation] = []
        for _, members in groupby(range(len(rows)), key=lambda place: rows[place].group):
            places = list(members)
            start, end = places[0], places[-1] + 1
            search = self._search(rows[start])
            ways = self._step(search, rows[start:end], scores[start:end], logits[start:end])
            continuations += [replace(way, parent=way.parent + start) for way in ways]
        return continuations

    def conclude(self, rows: Sequence[Row]) -> list[Continuation]:
        """The answers so far, among which the beams now are."""
        search = self._searches.get(rows[0].key)
        if search is None:
            return []
        for row in rows:
            beam = search.beams[row.key]
            tokens = tuple(row.output_token_ids)
            self._finish(search, beam.group, [Answer(search.score(beam.score, len(tokens)), tokens, beam.history)])
        return search.finals()

    def forked(self, parent: int, child: int) -> None:
        search = self._searches.get(parent)
        if search is not None:
            self._searches[child] = search
            search.beams[child] = search.forks[parent].pop(0)

    def release(self, key: int) -> None:
        search = self._searches.pop(key, None)
        if search is not None:
            search.beams.pop(key, None)

    def _search(self, row: Row) -> Search:
        search = self._searches.get(row.key)
        if search is None:
            assert isinstance(row.sampling.search, BeamSearch)
            search = self._searches[row.key] = Search(row.sampling.search, row)
        return search

    def _step(self, search: Search, rows: Sequence[Row], scores: Tensor, logits: Tensor) -> list[Continuation]:
        """One step of one search, or what it was decided before.

        scores: float32 [R, V], log p of each row after the processors, changed; logits: float32 [R, V], raw
        """
        before = len(rows[0].output_token_ids)
        if search.decided[0] == before:
            return search.decided[1]
        first = not search.beams
        ends = np.unique(ending(rows[0], scores.shape[1]))
        beams: list[list[tuple[int, Beam]]] = [[] for _ in rows]  # (token, beam) behind each row
        chosen: list[int] = []  # tokens of the groups so far
        for number, group in enumerate(search.groups):
            members = [0] if first else self._members(search, rows, number)
            if group.over or not members:
                continue
            own = [np.float32(0)] if first else [search.beams[rows[member].key].score for member in members]
            part = scores[members]  # a copy
            if chosen and search.parameters.diversity_penalty:
                tokens, counts = np.unique(chosen, return_counts=True)
                penalty = search.parameters.diversity_penalty * torch.from_numpy(counts).to(part)
                part[:, torch.from_numpy(tokens).to(part.device)] -= penalty
            part += torch.from_numpy(np.array(own)).to(part.device)[:, None]
            going, ending_ones = self._choose(search, part, members, ends, before + 1 == search.most)
            chosen += [each.token_id for each in (*going, *ending_ones)]
            self._report(search, rows, logits, [*going, *ending_ones])
            finished = [
                Answer(
                    search.score(each.score, before + 1),
                    (*rows[each.parent].output_token_ids, each.token_id),
                    each.history,
                )
                for each in ending_ones
            ]
            self._finish(search, number, finished)
            group.over = search.is_over(group, going, before + 1)
            if not group.over:
                for each in going:
                    beams[each.parent].append((each.token_id, Beam(number, each.score, each.history)))
        continuations = [
            Continuation(parent, (token_id,), held=before + 1)
            for parent, ways in enumerate(beams)
            for token_id, _ in ways
        ]
        if not continuations:
            continuations = search.finals()
        search.beams = {row.key: ways[0][1] for row, ways in zip(rows, beams, strict=True) if ways}
        search.forks = {row.key: [beam for _, beam in ways[1:]] for row, ways in zip(rows, beams, strict=True)}
        search.decided = before, continuations
        return continuations

    @staticmethod
    def _members(search: Search, rows: Sequence[Row], group: int) -> list[int]:
        """The rows of a group, the best first."""
        own = [(search.beams[row.key], place) for place, row in enumerate(rows)]
        return [place for beam, place in sorted(own, key=lambda each: -each[0].score) if beam.group == group]

    @staticmethod
    def _choose(
        search: Search, scores: Tensor, members: Sequence[int], ends: Ids, last: bool
    ) -> tuple[list[Candidate], list[Candidate]]:
        """What goes on and what is finished, each the best first.

        scores: float32 [M, V], s of each beam with each token; members: the rows that they are of
        ends: token ids that end an answer; last: whether each token does
        """
        vocabulary = scores.shape[1]
        values, places = largest(scores, search.width * max(2, 1 + len(ends)))
        going: list[Candidate] = []
        finished: list[Candidate] = []
        ending_tokens = set(ends.tolist())
        for rank, (value, place) in enumerate(zip(values, places.tolist(), strict=True)):
            member, token_id = divmod(place, vocabulary)
            candidate = Candidate(members[member], token_id, value)
            if last or token_id in ending_tokens:
                if rank < search.width:
                    finished.append(candidate)
            elif len(going) < search.width:
                going.append(candidate)
        return going, finished

    @staticmethod
    def _finish(search: Search, number: int, answers: list[Answer]) -> None:
        group = search.groups[number]
        group.finished = sorted([*group.finished, *answers], key=lambda each: -each.score)[: search.width]

    @staticmethod
    def _report(search: Search, rows: Sequence[Row], logits: Tensor, candidates: Sequence[Candidate]) -> None:
        """Give the candidates their histories, where log-probabilities are wanted."""
        top = rows[0].logprobs
        if top is None or not candidates:
            return
        raw = logits[[each.parent for each in candidates]]
        count, entropy = len(candidates), rows[0].entropy
        reports = token_logprobs(raw, [each.token_id for each in candidates], [top] * count, [entropy] * count)
        for each, report in zip(candidates, reports, strict=True):
            beam = search.beams.get(rows[each.parent].key)
            each.history = (None if beam is None else beam.history, report)


def _unrolled(history: History) -> Iterator[TokenLogprobs]:
    while history is not None:
        history, report = history
        yield report
