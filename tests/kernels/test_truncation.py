"""The compiled cuts against those in torch on a sorted vocabulary, on every set of lanes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.kernels import truncation
from lorry.kernels.truncation import COLUMNS, OFF
from lorry.server.decoding.truncation import WIDE, Truncation, kept

pytestmark = pytest.mark.usefixtures("kernels")
CUTS = {
    "top_n_sigma": st.sampled_from([0.3, 1.0, 2.5]),
    "top_k": st.sampled_from([1.0, 5.0, 127.0, 128.0, 129.0, 2048.0, 3000.0, 10_000.0]),
    "top_p": st.sampled_from([0.02, 0.4, 0.9, 0.999]),
    "min_p": st.sampled_from([1e-4, 0.02, 0.3, 1.0]),
    "typical_p": st.sampled_from([0.05, 0.5, 0.95]),
    "epsilon": st.sampled_from([1e-5, 3e-4, 0.02, 0.5]),
    "eta": st.sampled_from([1e-5, 3e-4, 0.02, 0.5]),
}
ONE = st.sampled_from(sorted(CUTS)).flatmap(lambda name: st.fixed_dictionaries({name: CUTS[name]}))
ENDS = (0.0, 1.0 - 2.0**-53)


def cuts_of(count: int, temperature: float = 1.0, **cuts: float) -> Truncation:
    named = {"temperature": temperature, **cuts}
    return Truncation(np.array([[named.get(name, off) for name, off in zip(COLUMNS, OFF, strict=True)]] * count))


def left_of(z: Tensor, cuts: Truncation) -> set[int]:
    low, high = kept(z[None], cuts).bounds()
    return set(((z >= low) & (z <= high)).nonzero()[:, 0].tolist())


def drawn(z: Tensor, uniforms: np.ndarray, temperature: float = 1.0, **cuts: float) -> list[int]:
    rows = z.repeat(len(uniforms), 1)
    return truncation.truncated_draw(rows, cuts_of(len(uniforms), temperature, **cuts).numbers, uniforms).tolist()


@settings(
    deadline=None,
    max_examples=300,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([1, 2, 127, 128, 129, 2048, 2049, 8209]),
    spread=st.sampled_from([0.1, 1.5, 4.0, 30.0]),
    forms=st.sampled_from(["normal", "ties", "forbidden"]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    cuts=st.one_of(ONE, st.fixed_dictionaries({}, optional=CUTS).filter(bool)),
)
def test_what_is_left_and_its_shares_are_those_of_the_sorted_vocabulary(
    seed: int, vocabulary: int, spread: float, forms: str, temperature: float, cuts: dict[str, float]
) -> None:
    z = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    if forms == "ties":
        z = z.round()
    elif forms == "forbidden":
        z[1::3] = -torch.inf
    truth = cuts_of(1, temperature, **cuts)
    wanted = left_of(z, truth)
    near = {  # what is left where every threshold is a hair lower or higher: sums round differently
        frozenset(left_of(z, cuts_of(1, temperature, **{k: _moved(k, v, by) for k, v in cuts.items()})))
        for by in (1 - 2e-6, 1 + 2e-6)
    }
    if near != {frozenset(wanted)}:
        return
    ids = torch.tensor(sorted(wanted))
    plain = set(cuts) <= {"top_k", "top_p", "min_p"}
    before = plain and "top_p" in cuts and WIDE <= cuts.get("top_k", 0) < vocabulary
    if vocabulary <= WIDE or (len(ids) < WIDE and not before):
        ids = ids[z[ids].argsort(descending=True, stable=True)]
    weights = _weights(z[ids], temperature)
    first, last = (ids.tolist().index(token) for token in drawn(z, np.array(ENDS), temperature, **cuts))
    assert weights[:first].sum() <= 1e-30 * weights.sum()
    assert weights[last + 1 :].sum() <= 1e-12 * weights.sum()
    found = drawn(z, np.arange(0.5, 400) / 400, temperature, **cuts)
    assert set(found) <= wanted
    shares = np.bincount(found, minlength=vocabulary)[ids.numpy()] / 400
    assert np.abs(shares - weights / weights.sum()).max() <= 1.01 / 400


def _moved(name: str, value: float, by: float) -> float:
    return value if name == "top_k" else min(value * by, 1.0 if name == "min_p" else value * by)


def _weights(z: Tensor, temperature: float) -> np.ndarray:
    found: np.ndarray = ((z.double() - z.max()) / temperature).exp().numpy()
    return found


def test_a_row_depends_on_no_other() -> None:
    generator = np.random.default_rng(5)
    logits = torch.randn(24, 8209) * torch.linspace(0.2, 9, 24)[:, None]
    numbers = np.array([OFF] * 24)
    for column, values in enumerate(([0.7, 1.3], [0, 2.0], [40, np.inf], [0.9, 1.0], [0, 0.01], [0.8, 1.0], [0, 1e-4])):
        numbers[:, column] = generator.choice(values, 24)
    uniforms = generator.random(24)
    together = truncation.truncated_draw(logits, numbers, uniforms)
    for row in range(24):
        at = slice(row, row + 1)
        assert truncation.truncated_draw(logits[at].contiguous(), numbers[at], uniforms[at])[0] == together[row]


@pytest.mark.parametrize("cut", COLUMNS[1:])
def test_a_row_with_one_token_keeps_it(cut: str) -> None:
    z = torch.full((300,), -torch.inf)
    z[7] = -4.0
    value = {"top_k": 1.0, "top_n_sigma": 0.5}.get(cut, 0.1)
    assert drawn(z, np.array([*ENDS, 0.5]), **{cut: value}) == [7, 7, 7]
