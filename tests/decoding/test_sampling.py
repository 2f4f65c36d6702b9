"""Sampling against transformers' warpers: which tokens are left, with which probabilities, and whose draw it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lorry.kernels import native
from lorry.kernels.sampling import Draws, SamplingRows, sample
from lorry.server.decoding import rowwise
from lorry.server.decoding.interface import Row
from lorry.server.decoding.rowwise import argmax, draw, nth_equal, probabilities, top_values
from lorry.server.decoding.sampling import Sampling, choose
from lorry.server.decoding.truncation import WIDE, Truncation, kept, truncated_draw
from lorry.server.params import Mirostat, SamplingParams, StoppingParams

MakeRow = Callable[..., Row]
ALMOST_ONE = 1 - 2.0**-53
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
WARPERS = {
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


def warped(logits: torch.Tensor, temperature: float, **cuts: float) -> torch.Tensor:
    """Probabilities in float64 after transformers' warpers, in its order. logits: [V]; returns [V].

    Top-nσ, which transformers has not, from its paper: z >= max z - n σ, on the rows as they come in.
    """
    logits = logits.double()
    if n := cuts.get("top_n_sigma"):
        finite = logits[logits > -torch.inf]
        logits = logits.masked_fill(logits < finite.max() - n * finite.std(correction=0), -torch.inf)
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    for name, warper in WARPERS.items():
        if cuts.get(name, 0) not in (0, 1.0):
            chain.append(warper(int(cuts[name]) if name == "top_k" else cuts[name]))
    if cuts.get("top_k") == 1:
        chain.insert(1, TopKLogitsWarper(1))
    if cuts.get("min_p") == 1.0:
        chain.insert(1 + bool(cuts.get("top_k")) + (cuts.get("top_p", 1.0) < 1), MinPLogitsWarper(1.0))
    return torch.softmax(chain(None, logits[None])[0], dim=0)


def truncation_of(count: int, temperature: float, **cuts: float) -> Truncation:
    row = Row(0, 0, 0, (), (), SamplingParams(temperature=temperature, **cuts), StoppingParams(9))  # type: ignore[arg-type]
    return Truncation.of([row] * count)


def draws(logits: torch.Tensor, uniform: np.ndarray, temperature: float, **cuts: float) -> np.ndarray:
    """One token of the row `logits` per number: the strategy's inverse distribution at those places."""
    count = len(uniform)
    rows = logits.expand(count, -1)
    if cuts == OFF:
        return draw(probabilities(rows, np.full(count, temperature, np.float32)), uniform)
    return truncated_draw(rows.contiguous(), truncation_of(count, temperature, **cuts), uniform)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 2.0, 9.0]),
    vocabulary=st.sampled_from([1, 2, 37, 131]),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 0, 1, 5, 36, 200]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    others=st.fixed_dictionaries(
        {},
        optional={
            "typical_p": st.floats(0.02, 0.98),
            "epsilon_cutoff": st.sampled_from([1e-3, 0.02, 0.3]),
            "eta_cutoff": st.sampled_from([1e-3, 0.05, 0.4]),
            "top_n_sigma": st.sampled_from([0.5, 1.0, 2.5]),
        },
    ),
)
def test_every_token_gets_its_share_of_the_unit_interval(
    seed: int,
    spread: float,
    vocabulary: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    others: dict[str, float],
) -> None:
    cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p, **others}
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    if seed % 3 == 0:
        logits[1::4] = -torch.inf
    wanted = warped(logits, temperature, **cuts).numpy()
    grid = (np.arange(2003) + 0.5) / 2003
    found = draws(logits, grid, temperature, **cuts)
    shares = np.bincount(found, minlength=vocabulary) / len(grid)
    assert np.abs(shares - wanted).max() <= 1.5 / len(grid)
    assert not shares[wanted == 0].any()


@pytest.mark.parametrize("vocabulary", [8209, 49152])
@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize(
    "cuts",
    [
        {**OFF, "top_k": 50},
        {**OFF, "top_k": 128},
        {**OFF, "top_k": 3001},
        {**OFF, "top_p": 0.3},
        {**OFF, "top_p": 0.97},
        {**OFF, "min_p": 0.02},
        {"top_k": 500, "top_p": 0.9, "min_p": 0.0},
        {"top_k": 129, "top_p": 0.8, "min_p": 0.01},
        {"typical_p": 0.2},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 3e-4},
        {"epsilon_cutoff": 2e-5},
        {"eta_cutoff": 6e-4},
        {"eta_cutoff": 0.03},
        {"top_n_sigma": 1.0},
        {"top_n_sigma": 2.5},
        {"top_k": 3000, "typical_p": 0.5},
        {"top_k": 3000, "top_p": 0.7, "min_p": 0.2},
        {"top_p": 0.9, "typical_p": 0.8, "epsilon_cutoff": 1e-3, "eta_cutoff": 2e-3, "top_n_sigma": 2.0},
    ],
    ids=lambda cuts: "-".join(f"{k}={v}" for k, v in cuts.items()),
)
def test_long_rows_keep_what_transformers_keeps(
    make_row: MakeRow, vocabulary: int, spread: float, cuts: dict[str, float]
) -> None:
    """By each of the ways: the outermost draws are the ends of what is kept, the others invert its distribution."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    wanted = warped(logits, 0.8, **cuts)
    order = torch.argsort(logits, descending=True)
    survivors = order[wanted[order] > 0]
    rising = set(cuts) <= set(OFF) and (len(survivors) >= WIDE or cuts.get("top_k") == 3000)
    if rising or len(survivors) >= WIDE:
        survivors = survivors.sort().values
    low, high = kept(logits[None], truncation_of(1, 0.8, **cuts)).bounds()
    left = (logits >= low) & (logits <= high)
    differing = int((left != (wanted > 0)).sum())
    assert differing <= (len(survivors) > 1000)  # transformers' sums in float64 over such rows may move an end by one
    places = np.array([0.0, 0.11, 0.5, 0.93, ALMOST_ONE])
    found = draws(logits, places, 0.8, **cuts)
    if not differing:
        assert found[0] == survivors[0]
        assert found[-1] == survivors[-1]
    ends = np.cumsum(wanted[survivors].numpy())
    slack = 1e-6 + differing * float(wanted[wanted > 0].min())
    for u, token in zip(places[1:-1], found[1:-1], strict=True):
        at = int((survivors == int(token)).nonzero())
        assert ends[at] - wanted[token] - slack <= u <= ends[at] + slack


@pytest.mark.parametrize("top_k", [1, 2, 7, 127, 300])
def test_tokens_equal_to_the_kth_are_kept_as_in_transformers(top_k: int) -> None:
    logits = (torch.randn(8209, generator=torch.Generator().manual_seed(5)) * 2).round()
    wanted = warped(logits, 1.0, top_k=top_k).numpy()
    grid = (np.arange(3001) + 0.5) / 3001
    found = draws(logits, grid, 1.0, **{**OFF, "top_k": top_k})
    assert set(found) <= set(np.flatnonzero(wanted))
    last = draws(logits, np.array([ALMOST_ONE]), 1.0, **{**OFF, "top_k": top_k})[0]
    assert last == np.flatnonzero((wanted > 0) & (logits.numpy() == logits[wanted > 0].min().item()))[-1]
    if (wanted > 0).sum() < 500:
        assert np.abs(np.bincount(found, minlength=8209) / 3001 - wanted).max() <= 1.5 / 3001


def test_equal_tokens_share_the_nucleus() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    found = draws(logits, (np.arange(999) + 0.5) / 999, 1.0, **{**OFF, "top_p": 0.1})
    assert np.bincount(found, minlength=5).tolist() == [0, 333, 333, 0, 333]


@pytest.mark.parametrize(
    ("cuts", "temperature"),
    [
        (OFF, 1.0),
        (OFF, 0.6),
        ({**OFF, "top_k": 20}, 1.3),
        ({**OFF, "top_p": 0.85}, 1.0),
        ({**OFF, "min_p": 0.1}, 1.0),
        ({"typical_p": 0.7}, 1.0),
        ({"epsilon_cutoff": 0.004}, 1.0),
        ({"eta_cutoff": 0.02}, 1.2),
        ({"top_n_sigma": 1.5}, 1.1),
        ({"top_k": 100, "top_p": 0.9, "min_p": 0.05}, 0.9),
        (
            {"top_n_sigma": 2.0, "top_k": 99, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "eta_cutoff": 1e-3},
            0.9,
        ),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "min-p", "typical", "epsilon", "eta", "sigma", "three", "all"],
)
def test_draws_follow_the_distribution(make_row: MakeRow, cuts: dict[str, float], temperature: float) -> None:
    """Chi-square over 24,000 draws of one sequence at consecutive positions, cells of at least 20 expected."""
    count = 24_000
    logits = torch.randn(300, generator=torch.Generator().manual_seed(11)) * 2
    wanted = warped(logits, temperature, **cuts).numpy()
    rows = [make_row(output=range(n), seed=77, temperature=temperature, **cuts) for n in range(count)]
    found: list[int] = []
    for start in range(0, count, 2000):
        found += choose(rows[start : start + 2000], logits.repeat(2000, 1))
    observed = np.bincount(found, minlength=300)
    assert not observed[wanted == 0].any()
    large = wanted * count >= 20
    expected = np.append(wanted[large], wanted[~large].sum()) * count
    observed = np.append(observed[large], observed[~large].sum())
    observed, expected = observed[expected > 5], expected[expected > 5]
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom >= 9
    # Wilson and Hilferty's cube-root approximation of the quantile at 1 - 1e-4
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def mixed_rows(make_row: MakeRow) -> list[Row]:
    """32 rows of all kinds, with long and short outputs."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7},
        {"top_k": 40, "temperature": 0.8},
        {"top_p": 0.95},
        {"top_p": 0.5, "temperature": 1.7, "presence_penalty": 0.5},
        {"min_p": 0.03, "repetition_penalty": 1.2},
        {"top_k": 700, "top_p": 0.99, "logit_bias": {17: 4.0}},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 1e-3, "typical_p": 0.97},
        {"eta_cutoff": 1e-3, "temperature": 1.3},
        {"top_n_sigma": 1.2, "temperature": 2.0},
        {"mirostat": Mirostat(tau=3.0)},
    ]
    return [
        make_row(key=i, output=list(range(i % 5)), index=i % 3, seed=2**63 + i, **kinds[i % len(kinds)])
        for i in range(32)
    ]


@pytest.mark.parametrize("vocabulary", [211, 8209, 49152])
@pytest.mark.parametrize("threads", [1, 2])
def test_alone_and_in_any_batch_the_same_tokens(make_row: MakeRow, vocabulary: int, threads: int) -> None:
    rows = mixed_rows(make_row)
    logits = torch.randn(32, vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        strategy = Sampling()
        together = [c.token_ids for c in strategy.decide(rows, logits.clone())]
        alone = [strategy.decide([row], logits[i : i + 1].clone())[0].token_ids for i, row in enumerate(rows)]
        order = np.random.default_rng(9).permutation(32).tolist()
        shuffled = strategy.decide([rows[i] for i in order], logits[order])
    finally:
        torch.set_num_threads(before)
    assert alone == together
    assert [c.token_ids for c in shuffled] == [together[i] for i in order]
    assert [c.parent for c in shuffled] == list(range(32))


@pytest.mark.parametrize("vocabulary", [211, 49152])
def test_probabilities_have_the_same_bits_in_any_batch(vocabulary: int) -> None:
    logits = torch.randn(17, vocabulary, generator=torch.Generator().manual_seed(2)) * 5
    temperatures = np.linspace(0.3, 2.0, 17, dtype=np.float32)
    together = probabilities(logits, temperatures)
    for count in (1, 2, 3, 7):
        for start in range(0, 17 - count, count):
            part = slice(start, start + count)
            assert torch.equal(probabilities(logits[part], temperatures[part]), together[part])


def test_sequences_of_one_request_differ_and_a_seed_repeats_them(make_row: MakeRow) -> None:
    logits = torch.zeros(1, 1009)

    def text(index: int, seed: int) -> list[int]:
        output: list[int] = []
        row = make_row(output=output, index=index, seed=seed)
        for _ in range(12):
            output += choose([row], logits)
        return output

    texts = [text(index, 5) for index in range(6)]
    assert len({tuple(t) for t in texts}) == 6
    assert text(3, 5) == texts[3]
    assert text(3, 6) != texts[3]


def test_a_fork_draws_on_from_its_parents_position(make_row: MakeRow) -> None:
    """A preempted or forked sequence is the same tokens under another key: it gets the same next token."""
    logits = torch.randn(1, 997, generator=torch.Generator().manual_seed(8))
    options = {"seed": 3, "frequency_penalty": 1.1, "top_p": 0.9}
    strategy = Sampling()
    output: list[int] = []
    row = make_row(key=1, output=output, **options)
    for _ in range(9):
        output += strategy.decide([row], logits.clone())[0].token_ids
    fork = make_row(key=2, output=list(output), **options)
    first, second = strategy.decide([row, fork], logits.repeat(2, 1))
    assert first.token_ids == second.token_ids
    assert Sampling().decide([row], logits.clone())[0].token_ids == first.token_ids


def test_greedy_takes_the_first_of_equals_and_obeys_processors(make_row: MakeRow) -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0], [0.0, 1.0, 2.0, 5.0]])
    minimum = StoppingParams(max_new_tokens=9, min_new_tokens=1)
    rows = [make_row(key=0, temperature=0.0), make_row(key=1, temperature=0.0, eos=(3,), stopping=minimum)]
    assert [c.token_ids for c in Sampling().decide(rows, logits)] == [(1,), (2,)]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e6])
def test_extreme_temperatures_stay_finite(make_row: MakeRow, temperature: float) -> None:
    logits = torch.tensor([[-3e4, 3e4, 2e4, -torch.inf]])
    found = {
        choose([make_row(seed=seed, temperature=temperature, top_p=top_p)], logits)[0]
        for seed in range(40)
        for top_p in (1.0, 0.999999)
    }
    assert found == ({0, 1, 2} if temperature > 1 else {1})


def test_logprobs_are_of_the_raw_logits(make_row: MakeRow) -> None:
    logits = torch.randn(3, 101, generator=torch.Generator().manual_seed(4))
    raw = torch.log_softmax(logits.double(), dim=1)
    rows = [
        make_row(key=0, temperature=0.0),
        make_row(key=1, temperature=0.0, logprobs=2, logit_bias={60: 50.0}),
        make_row(key=2, temperature=0.0, logprobs=0),
    ]
    plain, biased, bare = Sampling().decide(rows, logits)
    assert plain.logprobs is None
    assert biased.token_ids == (60,)
    assert biased.logprobs is not None and bare.logprobs is not None
    assert biased.logprobs[0].logprob == pytest.approx(float(raw[1, 60]), abs=2e-6)
    assert biased.logprobs[0].rank == 1 + int((raw[1] > raw[1, 60]).sum())
    assert [t.token_id for t in biased.logprobs[0].top] == raw[1].topk(2).indices.tolist()
    assert bare.logprobs[0].top == () and bare.logprobs[0].rank == 1


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 8192, 8209])
@pytest.mark.parametrize("ties", [False, True])
def test_row_primitives(vocabulary: int, ties: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(rowwise.vocabulary, "serves", lambda _: False)
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(6)) * 3
    logits = logits.round() if ties else logits
    ordered = logits.sort(dim=1, descending=True).values.numpy()
    for count in (1, 5, 128, 2048, vocabulary):
        assert np.array_equal(top_values(logits, count), ordered[:, :count])
    assert argmax(logits).tolist() == [row.tolist().index(row.max()) for row in logits]
    wanted = logits[:, vocabulary // 2].clone().numpy()
    for row, value in enumerate(wanted):
        for nth, place in enumerate((logits[row] == value).nonzero()[:, 0].tolist()):
            one = logits[row : row + 1]
            assert nth_equal(one, wanted[row : row + 1], np.array([nth])).tolist() == [place]


@pytest.mark.parametrize("vocabulary", [1, 127, 211, 8209])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"top_k": 30},
        {"top_k": 3000, "top_p": 0.9},
        {"top_p": 0.95},
        {"min_p": 0.01, "top_n_sigma": 3.0},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 1e-3},
        {"eta_cutoff": 2e-3, "top_p": 0.99},
        {"mirostat": Mirostat(tau=4.0)},
    ],
    ids=lambda cuts: "-".join(cuts) or "none",
)
def test_without_a_compiler_the_same_tokens(
    make_row: MakeRow, vocabulary: int, cuts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(7)) * 2
    logits[::3, vocabulary // 2 :] -= torch.inf
    logits[::3, 0] = 1.0
    rows = [make_row(key=key, seed=key, temperature=0.3 + 0.04 * key, **cuts) for key in range(40)]

    def tokens(strategy: Sampling) -> np.ndarray:
        return np.array([found.token_ids[0] for found in strategy.decide(rows, logits.clone())])

    compiled, plain = Sampling(), Sampling()
    chosen = tokens(compiled)
    monkeypatch.setattr(rowwise.vocabulary, "serves", lambda _: False)
    assert (chosen != tokens(plain)).sum() <= 1, "one draw may lie at a boundary"
    if "mirostat" in cuts:
        later = [replace(row, output_token_ids=[0]) for row in rows]  # its thresholds follow from this step's surprise
        thresholds = compiled.mirostat.epsilon(later), plain.mirostat.epsilon(later)
        assert (~np.isclose(*thresholds, rtol=1e-4)).sum() <= 1


def test_without_a_compiler_the_same_order_where_equals_of_the_kth_reach_far(
    make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """top-k leaves WIDE or more, as 600 tokens equal the k-th, and top-p fewer than WIDE."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(2 * WIDE + 3, generator=generator).sort(descending=True).values
    z[WIDE - 500 : WIDE + 100] = z[WIDE - 500].clone()
    z = z[torch.randperm(len(z), generator=generator)]
    rows = [make_row(key=key, seed=key, top_k=WIDE - 50, top_p=0.5) for key in range(20)]
    logits = z.repeat(20, 1)
    compiled = choose(rows, logits)
    monkeypatch.setattr(rowwise.vocabulary, "serves", lambda _: False)
    assert choose(rows, logits) == compiled
    nothing = torch.zeros(20, dtype=torch.int64)
    draws = Draws(torch.arange(20), nothing, nothing)
    top_k, top_p = torch.full((20,), WIDE - 50, dtype=torch.int32), torch.full((20,), 0.5, dtype=torch.float64)
    parameters = SamplingRows(torch.ones(20), top_k, top_p, torch.zeros(20, dtype=torch.float64))
    assert sample(logits, parameters, draws)[0].tolist() == compiled


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("vocabulary", [11, 4099])
def test_broken_rows_harm_nobody(
    make_row: MakeRow, vocabulary: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 5, "top_p": 0.9},
        {"typical_p": 0.9, "top_n_sigma": 1.0, "eta_cutoff": 0.01},
        {"mirostat": Mirostat()},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "min_p": 0.1},
    ]
    rows = [make_row(key=key, seed=key, logprobs=5, **kind) for key, kind in enumerate(kinds * 2)]
    logits = torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(1))
    wanted = [found.token_ids for found in Sampling().decide(rows[:6], logits[:6].clone())]
    for broken in (torch.nan, torch.inf, -torch.inf, 3e38):
        for every in (1, 3):
            logits[6:, ::every] = broken
            found = Sampling().decide(rows, logits.clone())
            assert [each.token_ids for each in found[:6]] == wanted
            assert all(0 <= each.token_ids[0] < vocabulary for each in found)
