"""Mirostat against its paper's algorithm, read aloud."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lorry.kernels import dispatch
from lorry.server.decoding.interface import Row
from lorry.server.decoding.mirostat import Mirostat
from lorry.server.decoding.sampling import Sampling, choose
from lorry.server.params import Mirostat as Settings

MakeRow = Callable[..., Row]


def logits_at(step: int, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(1, 1009, generator=torch.Generator().manual_seed(step)) * spread


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])
def test_the_threshold_follows_the_surprise(
    make_row: MakeRow, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    """And what was drawn lies below it; the device's way gives the same tokens."""
    tau, eta, temperature = 3.0, 0.2, 1.3
    output: list[int] = []
    options = {"seed": 4, "temperature": temperature, "mirostat": Settings(tau, eta)}
    row = make_row(key=1, output=output, **options)
    strategy, mu, surprises = Sampling(), 2 * tau, []
    told = Sampling()
    for step in range(40 if on_device else 400):
        logits = logits_at(step, 4.0)
        bits = -torch.log_softmax(logits.double()[0] / temperature, 0) / np.log(2)
        (again,) = strategy.decide([row], logits.clone())
        with monkeypatch.context() as patched:
            if on_device:
                patched.setattr("lorry.server.decoding.sampling.dispatch", dispatch)
                patched.setattr(Sampling, "decide", lambda self, rows, z: self._decide_on_device(rows, z, False))
            (found,) = told.decide([row], logits.clone())
        assert found == again
        (token,) = found.token_ids
        assert strategy.decide([row], logits.clone())[0] == found  # deciding twice moves nothing
        assert float(bits[token]) <= mu + 1e-4 or token == int(logits.argmax())
        surprises.append(float(bits[token]))
        mu -= eta * (surprises[-1] - tau)
        output.append(token)
        assert strategy.mirostat.epsilon([row])[0] == pytest.approx(2**-mu, rel=1e-3)
    if not on_device:
        assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.05)


def test_draws_are_of_what_the_threshold_leaves(make_row: MakeRow) -> None:
    """Chi-square over 24,000 first draws, whose threshold is 2 τ."""
    count, tau = 24_000, 2.5
    logits = torch.randn(200, generator=torch.Generator().manual_seed(3)) * 1.5
    p = torch.softmax(logits.double(), 0).numpy()
    wanted = np.where(-np.log2(p) <= 2 * tau, p, 0.0)
    wanted /= wanted.sum()
    rows = [make_row(key=n, seed=n, mirostat=Settings(tau)) for n in range(count)]
    found = [t for at in range(0, count, 4000) for t in choose(rows[at : at + 4000], logits.repeat(4000, 1))]
    observed = np.bincount(found, minlength=200)
    assert not observed[wanted == 0].any()
    expected = wanted[wanted > 0] * count
    chi_square = float(((observed[wanted > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom >= 5
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_fork_goes_on_from_its_parents_threshold(make_row: MakeRow) -> None:
    strategy, output = Sampling(), list[int]()
    row = make_row(key=1, output=output, mirostat=Settings(2.0, 0.9))
    for step in range(9):
        output += strategy.decide([row], logits_at(step))[0].token_ids
    fork = make_row(key=2, output=list(output), mirostat=Settings(2.0, 0.9))
    strategy.forked(1, 2)
    first, second = strategy.decide([row, fork], logits_at(9).repeat(2, 1))
    assert first.token_ids == second.token_ids
    strategy.release(2)
    assert strategy.mirostat.epsilon([fork])[0] == 2**-4.0 != strategy.mirostat.epsilon([row])[0]
    assert Mirostat().epsilon([row])[0] == 2**-4.0
