"""The line between the engine loop and the ways of choosing tokens.

The loop knows three verbs, plan → forward → commit. Commit hands the rows that have logits to a `Strategy`
and gets back `Continuation`s: which row goes on, with which tokens. Everything else is the loop's: appending
tokens, end-of-sequence, stop ids and lengths, forking block tables, freeing, sending. Everything about
probabilities is the strategy's.

A GPU must not stand still while the host reads a token, so a strategy may also `begin`: it enqueues the choice on
the device, whose next forward takes the tokens from there, and the host reads them one step later. The loop plans
ahead only while every row of the batch `can_begin`; else it waits for `decide` in each step. A strategy that can
name a row's next token without the host in between offers it; the default is that it cannot.

How the strategies of the field fit:

**Sampling, greedy** (`sampling.py`). One continuation with one token per row. They can begin, whatever the cuts of
their distribution are; but mirostat, whose next cut depends on what was drawn, and beams, candidates and drafts, of
which the host forks and truncates sequences, cannot.

**n > 1, best of n.** n sequences share the prompt's blocks from the start and differ by `Row.index`, which
the random draws depend on. Best of n is n > 1 here: the frontend adds up their log-probabilities and keeps the
best, so that stop strings end its sequences too and a GPU draws their tokens ahead.

**Searches** (`SamplingParams.search`; `strategies.py` hands their rows on). The rows of one request share
`Row.group` and are decided together: the loop runs all of them in a step or none, preempts them as one, and
hands them over in the order of their indices.

**Beam search** (`beam.py`). The strategy keeps per group the beams' scores and the finished hypotheses; from
width × vocabulary scores it returns the best `width` continuations by parent. A parent with two continuations
is forked (the first goes on in place, each other one gets a new sequence over the same blocks, copied on
write), a parent with none is dropped, so that reordering beams moves references and never KV. A hypothesis that
takes end-of-sequence is kept by the strategy and not continued. Beams are not streamed: `held` covers their
whole output. When the group is over, each of the n best is returned with `final` and its `score`, the best
first, under any parent that is left. When its time is over, `conclude` is asked for them.

**Contrastive search** (`contrastive.py`). A candidate must be run to get its hidden state, so candidates are
tentative forks: one step returns k continuations of a parent with `held=1` (their last token is not to be shown
yet, nor does it end anything), the next step sees k rows of one group with logits and, because their search
`observes`, the final hidden states; it chooses one by probability and degeneration penalty, continues only that
one (again as k tentative forks), and drops the others. The chosen token is then shown, and ends the search if it
is one that ends a sequence. The hidden states of the prompt come through `observe`, so such a prompt takes no
cached blocks; those so far are kept by the strategy, also while the group is preempted.

**Speculation** (`speculation/`). Some rows have a proposal: tokens that the step runs behind the row's last one, from
the text so far (prompt lookup) or from a draft model. `Row.draft_token_ids` holds it while decide runs, and the row
owns 1 + d consecutive rows of logits. The strategy decides each of them as if the draft before it were output, and
returns one continuation of m + 1 tokens with `accepted` = m: what the draft foretold, and one more. The loop keeps the
keys and values of the m tokens; those behind are written over. Tokens are those of the same seed without speculation.

**Grammars, bad words, allowed tokens.** A `Processor` changes the logits before anything is chosen:
no-repeat-ngram, DRY and bad words of several tokens look at the text so far, which has to be on the host; bad words of
one token and allowed tokens begin as lists. A grammar keeps its matcher per `Row.key`, derives it again from the tokens
when it meets a new key, and writes -inf for the whole batch at once from one bit mask. A matcher needs each token on
the host, so such rows cannot begin.

**Guidance** (`guidance.py`). A request is two sequences of one group: the second one, its shadow, has another combo (no
adapter) or another prompt, and the loop tells nothing of it. decide mixes their two rows of logits, has a token chosen
from the mix, and continues both with it.

**DoLa** (`dola.py`) is none of these: it takes the place of the logits before anything sees them. The loop has the
layers it names tapped for its rows, and `decide` gets what the contrast yields; sampling narrows it behind the
processors.

State. A strategy and its processors may keep state per `Row.key`, but it must follow from the row's tokens: a
preempted sequence comes back with the same key and the same tokens, a fork with a new key and its parent's
tokens. What a search keeps of its group follows from its rows' tokens and the decisions before. A step whose
decision failed for one row is decided again, row by row and search by search, from the same logits; so a strategy
must answer twice the same. `release` ends it. Nothing here may depend on which other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lorry.server.params import SamplingParams, StoppingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What decoding sees of one sequence. Made once per sequence: the token lists are the engine's own, and grow.

    key: identifies the sequence as long as the engine lives; a fork gets its own, a preempted sequence keeps its own
    group: identifies the request; the rows of one group are adjacent in a batch
    index: number of the sequence within its request, from 0
    prompt_token_ids, output_token_ids: read only. Preemption moves nothing from one to the other
    eos_token_ids: of the model, whether or not the request ignores them
    logprobs: None: none; k: report the chosen token's log-probability and the k most likely tokens
    entropy: report the entropy with each log-probability
    draft_token_ids: proposals whose logits follow the row's own in this step
    """

    key: int
    group: int
    index: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    sampling: SamplingParams
    stopping: StoppingParams
    eos_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    draft_token_ids: Sequence[int] = ()
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class Continuation:
    """How one row goes on. Several with one parent fork it; a parent without any is dropped.

    parent: index into the rows given to `decide`
    token_ids: the new tokens, in order; the engine cuts behind the first one that ends the sequence
    logprobs: one per new token, or None when the row asked for none
    held: how many of the newest tokens of the output must not be shown, nor end the sequence, yet
    final: `token_ids` is an answer in place of what the sequence held. A sequence without others is ended; of a search,
        finals are its answers in order, each behind what was shown
    score: of a final output, e.g. the length-normalised log-probability of a beam
    accepted: how many of the tokens are of the row's draft, which has been run; None: it had none
    """

    parent: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    held: int = 0
    final: bool = False
    score: float | None = None
    accepted: int | None = None


class Pending(Protocol):
    """Tokens under way: chosen by work that is enqueued on the device, and on their way to the host.

    tokens: int64 [R] on the logits' device, the next token of each row, which the next step's forward takes from there
    """

    @property
    def tokens(self) -> Tensor: ...

    def continuations(self) -> list[Continuation]:
        """One continuation of one token per row, in order. Waits until these tokens are on the host, and no longer."""
        ...


class Strategy(Protocol):
    """Chooses tokens. One object serves the whole engine; calls come from the engine's thread, between two forwards."""

    def decide(self, rows: Sequence[Row], logits: Tensor, hidden_states: Tensor | None = None) -> list[Continuation]:
        """Continue each row.

        rows: R sequences; those of one group are adjacent
        logits: float32 [Σ (1 + drafts of a row), V], the rows' logits one after the other. The callee may
            overwrite them
        hidden_states: [same, H], the states that the logits were computed from; given when the search of any
            row `observes`

        Returns continuations ordered by parent.
        """
        ...

    def can_begin(self, row: Row) -> bool:
        """Whether `begin` serves this row in this step."""
        return False

    def begin(self, rows: Sequence[Row], logits: Tensor, unread: Sequence[int], last: Tensor | None) -> Pending:
        """As `decide`, but nothing waits for the device: the tokens that `decide` would choose with the whole history.

        rows: R sequences that `can_begin`, one token each
        logits: float32 [R, V]. The callee may overwrite them
        unread: of each row 0 or 1, how many tokens were chosen on the device that `output_token_ids` lacks yet
        last: int64 [R] on the logits' device, the value of that token, void where unread is 0; None: all unread are 0

        When the result's `continuations` are asked for, every row's output is complete up to this step's token.
        """
        error: Exception = NotImplementedError(f"{type(self).__name__} begins no row")
        raise error

    def observe(self, key: int, hidden_states: Tensor) -> None:
        """More hidden states [T, H] of the prompt of a sequence whose search `observes`, in order, each once, the last
        before it is first decided. The callee may keep a copy; the tensor is the engine's."""
        return

    def conclude(self, rows: Sequence[Row]) -> list[Continuation]:
        """The time of a search is over between two steps: finals for what it has. Without any, what was shown is the
        answer.

        rows: all of one search
        """
        return []

    def forked(self, parent: int, child: int) -> None:
        """The engine forked a sequence; both are keys, and a parent's forks come in the order of its continuations. For
        state that is dear to derive from the tokens."""
        return

    def release(self, key: int) -> None:
        """The sequence has ended: forget its state. Keys never seen are legal."""


class Processor(Protocol):
    """Changes logits before a strategy reads them."""

    def applies(self, row: Row) -> bool:
        """Whether this row's parameters use the processor at all; constant for the life of the row."""
        ...

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        """Change `logits[places[i]]` for `rows[i]`, in place, and no other row.

        rows: only rows that `applies` is true of, at least one
        places: the index of each in logits
        logits: float32 [R, V]
        """
        ...

    def release(self, key: int) -> None:
        """The sequence has ended: forget its state. Keys never seen are legal."""
