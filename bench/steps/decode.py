"""Decode steps in steady state: wall clock of the real loop, after its answers were compared in three ways.

Greedy answers of a batch by graphs are compared to those of launches one by one, and to those of a row alone; where two
differ, both tokens must have been nearly as likely. Rounding differs with the plan of a kernel, and with it the choice
between equals.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import numpy as np
from gpu.measure import Figure, Wrong
from steps.session import Session, adapters_of
from steps.sizes import Mix

from lorry.server.engine.batch import Batch
from lorry.server.engine.graphs import Bucket
from lorry.server.engine.local import Answer, Completion
from lorry.server.engine.messages import Generate
from lorry.server.engine.output import Output

NEAR = 0.3  # of log-probability, as much as rounding in bfloat16 over all layers may change
SHOWN = 20  # likeliest tokens that a checked answer tells of


@dataclass
class Seen:
    """The steps that the runner was given: rows and, where a graph served it, its bucket; and the last one."""

    steps: list[tuple[int, Bucket | None]] = field(default_factory=list)
    last: Batch | None = None


@contextmanager
def watched(session: Session) -> Iterator[Seen]:
    """Notes every step of the block."""
    runner, seen = session.runner, Seen()
    forward = runner.forward

    def noting(batch: Batch) -> Output:
        bucket = None if runner.graphs is None else runner.graphs.find(batch.inputs)
        seen.steps.append((batch.inputs.kv_lens.shape[0], bucket))
        seen.last = batch
        return forward(batch)

    with mock.patch.object(runner, "forward", noting):
        yield seen


def steady(session: Session, requests: list[Generate]) -> list[float]:
    """Seconds of each measured step of requests that are run together to their end.

    Raises Wrong where a measured step had other rows, or no graph.
    """
    moments = list[float]()
    with watched(session) as seen:
        session.engine.send(*requests)
        while session.engine.step():
            moments.append(time.perf_counter())
    session.taken(requests)
    kept = slice(session.sizes.warm, requests[0].stopping.max_new_tokens - 1)
    for rows, bucket in seen.steps[kept]:
        if rows != len(requests) or bucket is None:
            raise Wrong(f"a step of {len(requests)} rows ran with {rows}, as {bucket or 'no graph'}")
    return [after - before for before, after in itertools.pairwise(moments[kept])]


# -------------------------------------------------------------------- answers


def compare(what: str, answers: Sequence[Answer], others: Sequence[Answer]) -> None:
    """Raises Wrong unless they are equal up to near-ties."""
    for number, (answer, other) in enumerate(zip(answers, others, strict=True)):
        compare_one(f"{what}, answer {number}", answer.completions[0], other.completions[0])


def compare_one(what: str, answer: Completion, other: Completion) -> None:
    for place, (ours, theirs) in enumerate(zip(answer.logprobs, other.logprobs, strict=True)):
        listed = {token.token_id: token.logprob for token in theirs.top}
        found = listed.get(ours.token_id)
        if found is None or abs(found - ours.logprob) > NEAR or theirs.logprob - found > NEAR:
            raise Wrong(
                f"{what}: token {place} is {ours.token_id} with {ours.logprob:.3f}, "
                f"not {theirs.token_id} with {theirs.logprob:.3f}, beside which it has {found}"
            )
        if ours.token_id != theirs.token_id:  # from here on the texts differ
            return


def check(session: Session, rows: int, mix: Mix, base: Sequence[Answer] | None) -> list[Answer]:
    """The answers, compared; base: those without adapters, from which these must differ."""
    sizes = session.sizes

    def run(chosen: int | range = rows) -> list[Answer]:
        requests = session.requests(chosen, adapters_of(mix), sizes.checked, steps=sizes.steps, logprobs=SHOWN)
        return session.generate(requests)

    answers = run()
    graphs, session.runner.graphs = session.runner.graphs, None
    try:
        compare(f"{rows} rows, {mix}: graphs against single launches", answers, run())
    finally:
        session.runner.graphs = graphs
    for row in {0, rows - 1}:
        compare(f"{rows} rows, {mix}: row {row} against itself alone", [answers[row]], run(range(row, row + 1)))
    if base is not None and any(_same(a, b) for a, b in zip(answers, base, strict=True)):
        raise Wrong(f"{rows} rows, {mix}: an adapter changes nothing")
    return answers


def _same(answer: Answer, other: Answer) -> bool:
    """Whether the first tokens are as likely, within rounding, and all are equal."""
    ours, theirs = answer.completions[0], other.completions[0]
    near = abs(ours.logprobs[0].logprob - theirs.logprobs[0].logprob) < NEAR / 10
    return near and ours.token_ids == theirs.token_ids


# -------------------------------------------------------------------- the case


def decode(session: Session, rows: int) -> Iterator[Figure]:
    """All mixes of a batch in turn, so that the GPU's clock is the same for all."""
    sizes, mixes = session.sizes, session.sizes.mixes_of(rows)
    base: list[Answer] | None = None
    for mix in mixes:
        answers = check(session, rows, mix, base)
        base = answers if base is None else base
    gaps: dict[Mix, list[list[float]]] = {mix: [] for mix in mixes}
    for _ in range(sizes.rounds):
        for mix in mixes:
            gaps[mix].append(steady(session, session.requests(rows, adapters_of(mix), sizes.steps)))
    tokens = session.start_of(sizes.steps) + (sizes.warm + sizes.steps) / 2
    bare: float | None = None
    for mix in mixes:
        figure = Figure("decode", str(mix), rows, None, session.bytes_of(rows, mix, tokens))
        if not session.stage.dry:
            figure.seconds = statistics.median(statistics.mean(each) for each in gaps[mix])
            figure.parts["p99"] = float(np.percentile(np.concatenate(gaps[mix]), 99))
            bare = figure.seconds if not mix.count else bare
            if mix.count:
                figure.parts["without adapters"] = bare
        yield figure


def cases(batches: Sequence[int]) -> dict[str, partial[Iterator[Figure]]]:
    return {f"decode, {rows} rows": partial(decode, rows=rows) for rows in batches}
