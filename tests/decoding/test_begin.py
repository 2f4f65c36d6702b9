"""Tokens chosen without a wait are those of `decide` with the whole history, by the references and by the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorry.kernels import dispatch
from lorry.server.decoding.interface import Continuation, Row, Strategy
from lorry.server.decoding.lists import token_lists
from lorry.server.decoding.processors import Processors, default_chain
from lorry.server.decoding.sampling import Sampling
from lorry.server.decoding.truncation import extended
from lorry.server.params import Dry, Mirostat, StoppingParams

MakeRow = Callable[..., Row]
VOCABULARY = 151  # no multiple of a block
EOS = 7
VOID = -(2**40)  # what stands in `last` where nothing is unread

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {},
    {"temperature": 1e-60, "top_p": 0.5},
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 10**12, "top_p": 0.9, "logprobs": 0},
    {"min_p": 0.05, "temperature": 1.9, "logprobs": 20},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "frequency_penalty": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.7, "logprobs": 2},
    {"presence_penalty": 1.5, "frequency_penalty": -0.6, "repetition_penalty": 0.8},
    {"logit_bias": {3: 4.5, EOS: 9.0, 150: -100.0}, "minimum": 6, "logprobs": 200},
    {"temperature": 0.0, "minimum": 3, "presence_penalty": -2.0, "logit_bias": {EOS: 100.0, 9: 1.0}},
    {"minimum": 2, "top_k": 3},
    {"typical_p": 0.4, "logprobs": 2},
    {"epsilon_cutoff": 0.01, "temperature": 1.4, "frequency_penalty": 0.7},
    {"eta_cutoff": 0.02, "top_p": 0.9, "logit_bias": {4: 3.0}, "logprobs": 1},
    {"top_n_sigma": 1.5, "top_k": 30, "min_p": 0.001, "typical_p": 0.8, "temperature": 1e-60},
    {"top_n_sigma": 1.0, "temperature": 3.0},
    {"temperature": 0.0, "typical_p": 0.3, "top_n_sigma": 0.1},
    {"allowed_token_ids": (3, EOS, 150, 9), "bad_words": ((9,), (3,)), "minimum": 4, "logit_bias": {3: 9.0}},
    {"allowed_token_ids": (EOS, 11), "minimum": 9, "repetition_penalty": 1.4, "logprobs": 2},
    {"logit_bias": {150: 2.5}, "repetition_penalty": 1.3, "frequency_penalty": 1.2, "top_p": 0.7, "logprobs": 1},
]


@pytest.fixture(params=["reference", "kernels"])
def begin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Continuation]]:
    """`Sampling.begin` to its end, on a GPU or, on the CPU, by the references or by the kernels in the interpreter.

    Leaves in the logits what it left on the device.
    """
    if torch.cuda.is_available() and request.param == "reference":
        pytest.skip("a GPU's tensors are the kernels'")

    def begun(
        strategy: Sampling, rows: Sequence[Row], logits: Tensor, unread: Sequence[int], last: Sequence[int] | None
    ) -> list[Continuation]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert all(strategy.can_begin(row) for row in rows)
        with monkeypatch.context() as patched:
            patched.setattr(dispatch, "on_gpu", lambda _: request.param == "kernels")
            lasts = None if last is None else torch.tensor(last, device=device)
            pending = strategy.begin(rows, there := logits.to(device), unread, lasts)
            continuations = pending.continuations()
        logits.copy_(there)
        assert [(token,) for token in pending.tokens.tolist()] == [each.token_ids for each in continuations]
        return continuations

    return begun


def row_of(make_row: MakeRow, kind: dict[str, Any], generator: np.random.Generator, **fields: Any) -> Row:
    options = {name: value for name, value in kind.items() if name != "minimum"}
    stopping = StoppingParams(99, kind.get("minimum", 0), stop_token_ids=(11, EOS, VOCABULARY + 3))
    return make_row(
        prompt=generator.integers(VOCABULARY, size=generator.integers(1, 40)).tolist(),
        index=int(generator.integers(3)),
        seed=int(generator.integers(2**64, dtype=np.uint64)),
        eos=(EOS,),
        stopping=stopping,
        **fields,
        **options,
    )


def logits_of(seed: int, count: int) -> Tensor:
    """Every other row holds many equal values, among them the largest and zeros of either sign."""
    z = torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    z[1::2] = z[1::2].round().clamp(max=2)
    return z


def expect_equal(found: Sequence[Continuation], wanted: Sequence[Continuation]) -> None:
    assert [(each.parent, each.token_ids) for each in found] == [(each.parent, each.token_ids) for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert [t.token_id for t in a.top] == [t.token_id for t in b.top]
            assert a.logprob == pytest.approx(b.logprob, abs=3e-6)
            assert [t.logprob for t in a.top] == pytest.approx([t.logprob for t in b.top], abs=3e-6)


def expect_changed_alike(there: Tensor, here: Tensor, rows: Sequence[Row]) -> None:
    """The logits that a device was left with: -inf over what it cut, which the host does in lists of its own."""
    cut = torch.tensor([row.sampling.temperature > 0 and extended(row) for row in rows])
    assert torch.equal(there[~cut], here[~cut])
    assert ((there == here) | (there == -torch.inf))[cut].all()
    assert (there[cut] > -torch.inf).any(1).all()


@pytest.mark.parametrize("seed", range(5))
def test_mixed_batches_equal_decide(begin: Callable[..., Any], make_row: MakeRow, seed: int) -> None:
    generator = np.random.default_rng(seed)
    unread = generator.integers(2, size=len(KINDS)).tolist()
    outputs = [generator.integers(VOCABULARY, size=generator.integers(1, 7)).tolist() for _ in KINDS]
    outputs[0], unread[0] = [], 0
    for place, kind in enumerate(KINDS):
        if "minimum" in kind:  # one token short of it, the unread one included, or none
            outputs[place], unread[place] = [4] * (kind["minimum"] - seed % 2), 1
    rows = [
        row_of(make_row, kind, np.random.default_rng([seed, place]), key=place, output=outputs[place])
        for place, kind in enumerate(KINDS)
    ]
    z = logits_of(seed, len(rows))
    changed = z.clone()
    wanted = Sampling().decide(rows, changed)
    last = [output.pop() if more else VOID for output, more in zip(outputs, unread, strict=True)]
    expect_equal(begin(Sampling(), rows, z, unread, last), wanted)
    expect_changed_alike(z, changed, rows)


def test_a_run_ahead_of_the_host_gives_the_tokens_of_one_that_waits(
    begin: Callable[..., Any], make_row: MakeRow
) -> None:
    """With forks, preemptions and pauses, in which nothing is unread, and batches of changing rows."""
    generator = np.random.default_rng(8)
    kinds = [KINDS[place] for place in (0, 6, 7, 9, 11, 15, 16, 19)]
    waiting, ahead = Sampling(), Sampling()
    known: list[list[int]] = [[] for _ in kinds]  # what the host has read, in the run ahead
    told: list[list[int]] = [[] for _ in kinds]  # of the run that waits
    seeds = [int(generator.integers(99)) for _ in kinds]
    rows, slow = (
        [
            row_of(make_row, kind, np.random.default_rng(seed), key=key, output=outputs[key])
            for key, (kind, seed) in enumerate(zip(kinds, seeds, strict=True))
        ]
        for outputs in (known, told)
    )
    under_way: dict[int, int] = {}
    for step in range(9):
        if step in (4, 7):  # the host catches up; in step 7 one row's state is lost, another goes on under a new key
            for key, token in under_way.items():
                known[key].append(token)
            under_way = {}
            if step == 7:
                ahead.release(2)
                rows[3] = replace(rows[3], key=33)
        batch = [key for key in range(len(rows)) if (key + step) % 5]
        z = logits_of(step, len(batch))
        changed = z.clone()
        unread = [int(key in under_way) for key in batch]
        last = [under_way.get(key, VOID) for key in batch]
        found = begin(ahead, [rows[key] for key in batch], z, unread, last if any(unread) else None)
        wanted = waiting.decide([slow[key] for key in batch], changed)
        expect_changed_alike(z, changed, [slow[key] for key in batch])
        expect_equal(found, wanted)
        for key in batch:
            if key in under_way:
                known[key].append(under_way.pop(key))
        for key, continuation in zip(batch, wanted, strict=True):
            under_way[key] = continuation.token_ids[0]
            told[key].append(continuation.token_ids[0])
    assert all(len(output) > 5 for output in told)


def test_rows_do_not_depend_on_their_batch(begin: Callable[..., Any], make_row: MakeRow) -> None:
    generator = np.random.default_rng(3)
    rows = [row_of(make_row, KINDS[place], generator, key=place, output=[4, 4]) for place in (2, 6, 9, 10)]
    z = logits_of(1, len(rows))
    together = begin(Sampling(), rows, z.clone(), [1] * 4, [9, 4, 7, 9])
    for place, last in enumerate((9, 4, 7, 9)):
        (alone,) = begin(Sampling(), [rows[place]], z[place : place + 1].clone(), [1], [last])
        assert (alone.token_ids, alone.logprobs) == (together[place].token_ids, together[place].logprobs)


def test_broken_and_forbidden_rows_harm_nobody(begin: Callable[..., Any], make_row: MakeRow) -> None:
    everything = dict.fromkeys(range(VOCABULARY), -torch.inf)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 5},
        {"top_p": 0.8, "logprobs": 5},
        {"frequency_penalty": 1.0, "logprobs": 5},
    ]
    rows = [row_of(make_row, kind, np.random.default_rng(2), key=key) for key, kind in enumerate(kinds * 3)]
    rows.append(row_of(make_row, {**kinds[0], "logit_bias": everything}, np.random.default_rng(2), key=20))
    z = logits_of(2, len(rows))
    healthy = [0, 1, 2, 9]
    wanted = Sampling().decide([rows[place] for place in healthy], z[healthy])
    z[3:6] = torch.nan
    z[6:9] = -torch.nan
    z[7, 5:50] = 1.0
    found = begin(Sampling(), rows, z, [0] * len(rows), None)
    expect_equal([found[place] for place in healthy[:3]], wanted[:3])
    assert found[9].token_ids == wanted[3].token_ids == (0,)
    for each in found:
        assert each.logprobs is not None
        assert 0 <= each.token_ids[0] < VOCABULARY
        assert all(0 <= t.token_id < VOCABULARY for t in each.logprobs[0].top)


def test_lists_name_a_token_once(make_row: MakeRow) -> None:
    rows = [
        row_of(make_row, kind, np.random.default_rng(0), key=key, output=[5, 5, 9]) for key, kind in enumerate(KINDS)
    ]
    lists = token_lists(Processors(), rows, [0] * len(rows), VOCABULARY)
    assert lists is not None
    for starts, ids, _ in (lists.added, lists.counted):
        for start, end in pairwise(starts):
            assert len(set(ids[start:end])) == end - start
    starts, ids, values = lists.added
    added = dict(zip(ids[starts[10] : starts[11]].tolist(), values[starts[10] : starts[11]].tolist(), strict=True))
    assert added == {3: 4.5, 150: -100.0, EOS: -torch.inf, 11: -torch.inf}


@pytest.mark.parametrize("asking", [False, True])
def test_begin_reads_nothing_from_the_device(make_row: MakeRow, monkeypatch: pytest.MonkeyPatch, asking: bool) -> None:
    """On tensors without data, whatever would read one raises."""
    from lorry.kernels.triton import penalties, sampling

    launched: list[str] = []

    def sample(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        launched.append("sample")
        return torch.empty(len(logits), dtype=torch.int64, device="meta"), torch.empty(len(logits), device="meta")

    monkeypatch.setattr(dispatch, "on_gpu", lambda _: True)
    monkeypatch.setattr(penalties, "penalize", lambda *_: launched.append("penalize"))
    monkeypatch.setattr(sampling, "sample", sample)
    generator = np.random.default_rng(1)
    kinds = [kind if asking else {**kind, "logprobs": None} for kind in KINDS]
    rows = [row_of(make_row, kind, generator, key=key, output=[3]) for key, kind in enumerate(kinds)]
    logits = torch.empty(len(rows), VOCABULARY, device="meta")
    last = torch.empty(len(rows), dtype=torch.int64, device="meta")
    pending = Sampling().begin(rows, logits, [1] * len(rows), last)
    assert launched == ["penalize", "sample"]
    assert pending.tokens.is_meta and pending.tokens.shape == (len(rows),)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pending.continuations()
    launched.clear()
    Sampling().begin(rows[2:7], logits[2:7], [1] * 5, last[2:7])
    assert launched == ["sample"]  # no row asks for a change


class Forbid:
    """A processor of another make: token 0 only."""

    def applies(self, row: Row) -> bool:
        return row.key == 1

    def apply(self, rows: Sequence[Row], places: Sequence[int], logits: Tensor) -> None:
        logits[list(places), 1:] = -torch.inf

    def release(self, key: int) -> None:
        pass


def test_what_cannot_begin_is_decided(make_row: MakeRow, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Sampling(Processors([*default_chain(), Forbid()]))
    rows = [
        make_row(key=0, logprobs=2, temperature=0.0),
        make_row(key=1, logprobs=2, repetition_penalty=1.5),
        make_row(key=2, logprobs=2, output=[5, 5, 9], repetition_penalty=1.5, frequency_penalty=0.7),
    ]
    assert [strategy.can_begin(row) for row in rows] == [True, False, True]
    waiting: list[dict[str, Any]] = [
        {"mirostat": Mirostat()},
        {"dry": Dry(1.0)},
        {"no_repeat_ngram_size": 2},
        {"bad_words": ((1,), (2, 3))},
    ]
    assert not any(Sampling().can_begin(make_row(**each)) for each in waiting)
    z = logits_of(4, 3)
    wanted = strategy.decide(rows, here := z.clone())
    assert wanted[1].token_ids == (0,)
    if not torch.cuda.is_available():
        monkeypatch.setattr(dispatch, "on_gpu", lambda _: True)
    there = z.clone().to("cuda" if torch.cuda.is_available() else "cpu")
    expect_equal(strategy.decide(rows, there), wanted)
    assert torch.equal(there.cpu(), here) and not torch.equal(here[2], z[2])


def test_a_strategy_begins_nothing_unless_it_says_so(make_row: MakeRow) -> None:
    class Waiting(Strategy):
        pass

    assert not Waiting().can_begin(make_row())
    with pytest.raises(NotImplementedError):
        Waiting().begin([], torch.empty(0, 1), [], None)


def test_a_token_outside_the_vocabulary_is_refused(begin: Callable[..., Any], make_row: MakeRow) -> None:
    row = make_row(prompt=[1, VOCABULARY], repetition_penalty=1.5)
    with pytest.raises(IndexError, match="vocabulary of 151"):
        begin(Sampling(), [row], logits_of(0, 1), [0], None)
