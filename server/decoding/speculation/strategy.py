"""Speculative decoding, lossless: proposed tokens are run together with the last one, and those that would have been
chosen anyway are kept.

A row with output o and proposal d[0..k-1] has k + 1 rows of logits. Row i is decided as if the output were
o + d[0..i-1], by the same processors, cuts and random number as ever:

    t[i] = the token that decoding without a proposal would choose behind o + d[0..i-1]
    the answer goes on with t[0..m],  m = the least i with t[i] ≠ d[i], or k

So the tokens are those of the same seed without speculation, one by one, whoever proposes, how much, and whatever else
the batch holds. Rejection sampling (Leviathan et al. 2023, Chen et al. 2023) accepts x with min(1, p(x) / q(x)); a
proposal that is certain, as prompt lookup's, has q(x) = 1 and is accepted with p(x), which is how often a draw from p
is x. A draft model's proposals are drawn from q with the very numbers that will draw from p: the more alike the two
are, the more often they agree. What rejection sampling would accept beyond that it pays for with other tokens than the
seed's.

Who is not served: searches, whose rows are decided together; DoLa, which contrasts the layers of one token; mirostat,
whose cut depends on the token before; forced tokens, which are appended without being run.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorry.server.decoding.around import Around
from lorry.server.decoding.grammar import Grammar
from lorry.server.decoding.history import Histories
from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.decoding.speculation.pace import Pace
from lorry.server.decoding.speculation.prompt_lookup import look_up
from lorry.server.params import Speculation


class Speculating(Around):
    """Another strategy, several of whose tokens are decided in one step."""

    def __init__(self, inner: Strategy, grammar: Grammar) -> None:
        super().__init__(inner)
        self.pace = Pace()
        self._grammar = grammar
        self._histories = Histories()
        self._keys = itertools.count(-1, -1)
        self.drafted: Counter[str] = Counter()  # tokens, by proposer
        self.accepted: Counter[str] = Counter()

    def room(self, row: Row, share: float, limit: int) -> int:
        """How many tokens, `limit` at most, to propose for a row that `speculates`.

        share: how much of its step a proposed token costs
        """
        wanted, place = _wanted(row), len(row.output_token_ids)
        most = min(limit, wanted.max_draft_tokens, row.stopping.max_new_tokens - place - 1)
        if most < 1:
            return 0
        return self.pace.length(row.key, place, share, most) if wanted.adaptive else most

    def look_up(self, row: Row, limit: int) -> list[int]:
        """At most `limit` tokens from the row's own text."""
        return self._possible(row, look_up(self._histories.of(row), limit))

    def propose(self, rows: Sequence[Row], drafts: Sequence[Sequence[int]], logits: Tensor) -> list[int | None]:
        """The next token that a draft model proposes for each row behind its draft; None: the draft ends there.

        logits: float32 [R, V], the draft model's. The callee may overwrite them
        """
        ahead = [self._ahead(row, draft) for row, draft in zip(rows, drafts, strict=True)]
        tokens = [way.token_ids[0] for way in self.inner.decide(ahead, logits)]
        self._forget(ahead)
        ends = [{*row.eos_token_ids, *row.stopping.stop_token_ids} for row in rows]
        return [None if token in ending else token for token, ending in zip(tokens, ends, strict=True)]

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        if not any(row.draft_token_ids for row in rows):
            return self.inner.decide(rows, logits, hidden_states)
        places = [place for place, row in enumerate(rows) for _ in range(1 + len(row.draft_token_ids))]
        ahead = [self._ahead(row, row.draft_token_ids[:i]) for row in rows for i in range(1 + len(row.draft_token_ids))]
        ways = self.inner.decide(ahead, logits, hidden_states)
        self._forget(ahead)
        continuations: list[Continuation] = []
        for place, own in itertools.groupby(ways, key=lambda way: places[way.parent]):
            row, found = rows[place], list(own)
            if row.draft_token_ids:
                found = [self._accepted(row, found)]
            continuations += [replace(way, parent=place) for way in found]
        return continuations

    def can_begin(self, row: Row) -> bool:
        """Not while the row may propose something, for which the host needs all of its tokens."""
        if not super().can_begin(row):
            return False
        return not row.sampling.speculates or self.pace.rests(row.key, len(row.output_token_ids) + 1)

    def release(self, key: int) -> None:
        super().release(key)
        self._histories.release(key)
        self.pace.release(key)

    def _possible(self, row: Row, draft: list[int]) -> list[int]:
        """As much of a proposal as may be run: nothing that ends the row, nothing that its grammar does not hold."""
        ending = {*row.eos_token_ids, *row.stopping.stop_token_ids}
        draft = list(itertools.takewhile(lambda token: token not in ending, draft))
        return draft[: self._grammar.holds(row, draft)] if draft else draft

    def _ahead(self, row: Row, draft: Sequence[int]) -> Row:
        """The row as it will be behind its draft; one of its own, whose state lasts for the step."""
        if not draft:
            return replace(row, draft_token_ids=()) if row.draft_token_ids else row
        output = [*row.output_token_ids, *draft]
        ahead = replace(row, key=next(self._keys), output_token_ids=output, draft_token_ids=())
        self._grammar.forked(row.key, ahead.key)
        return ahead

    def _forget(self, ahead: Sequence[Row]) -> None:
        for row in ahead:
            if row.key < 0:
                self.inner.release(row.key)

    def _accepted(self, row: Row, ways: Sequence[Continuation]) -> Continuation:
        """One continuation out of one for each row of logits."""
        tokens = [way.token_ids[0] for way in ways]
        pairs = zip(tokens, row.draft_token_ids, strict=False)
        accepted = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.pace.saw(row.key, len(row.output_token_ids), len(row.draft_token_ids), accepted)
        self.drafted[_wanted(row).proposer] += len(row.draft_token_ids)
        self.accepted[_wanted(row).proposer] += accepted
        kept = ways[: accepted + 1]
        logprobs = tuple(each for way in kept for each in way.logprobs or ())
        return Continuation(0, tuple(tokens[: accepted + 1]), logprobs or None, accepted=accepted)


def _wanted(row: Row) -> Speculation:
    assert row.sampling.speculation is not None, "a row with a draft speculates"
    return row.sampling.speculation
