"""Forced text is appended without a forward pass for each of its tokens.

Where the grammar of a row leaves one text to go on with, the tokens of that text follow the chosen one in the same
continuation; the next step computes them as it would a piece of a prompt. llguidance gives the tokens that the
tokenizer would make of the text, without the last ones, which what follows could join.

The text is what decoding token by token would have given. Its division into tokens may be another, since a mask also
allows every beginning of a token, and so may be what the model makes of it: only rows that ask for it are skipped
ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorry.server.decoding.around import Around
from lorry.server.decoding.grammar import Grammar
from lorry.server.decoding.interface import Continuation, Row, Strategy


class SkipForced(Around):
    """Another strategy, whose continuations are lengthened by what is forced."""

    def __init__(self, inner: Strategy, grammar: Grammar) -> None:
        super().__init__(inner)
        self._grammar = grammar

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        return [self._longer(rows[way.parent], way) for way in super().decide(rows, logits, hidden_states)]

    def _longer(self, row: Row, way: Continuation) -> Continuation:
        wanted = row.sampling.structured_output
        if wanted is None or not wanted.skip_forced or row.logprobs is not None or len(way.token_ids) != 1:
            return way
        return replace(way, token_ids=(*way.token_ids, *self._grammar.forced(row, way.token_ids[0])))
