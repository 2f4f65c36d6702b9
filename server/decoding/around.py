"""A strategy that does one thing more than another, which it holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorry.server.decoding.interface import Continuation, Pending, Row, Strategy


class Around(Strategy):
    """All verbs are the inner strategy's; a subclass says what it does otherwise."""

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        return self.inner.decide(rows, logits, hidden_states)

    def can_begin(self, row: Row) -> bool:
        return self.inner.can_begin(row)

    def begin(self, rows: Sequence[Row], logits: Tensor, unread: Sequence[int], last: Tensor | None) -> Pending:
        return self.inner.begin(rows, logits, unread, last)

    def observe(self, key: int, hidden_states: Tensor) -> None:
        self.inner.observe(key, hidden_states)

    def conclude(self, rows: Sequence[Row]) -> list[Continuation]:
        return self.inner.conclude(rows)

    def forked(self, parent: int, child: int) -> None:
        self.inner.forked(parent, child)

    def release(self, key: int) -> None:
        self.inner.release(key)
