"""Log-probabilities against log_softmax in float64 and a stable sort."""

from __future__ import annotations

import pytest
import torch

from lorry.kernels import dispatch
from lorry.server.decoding import logprobs
from lorry.server.decoding.logprobs import CHUNK, prompt_logprobs, token_logprobs


@pytest.fixture(params=[False, True], ids=["cpu", "device"])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU too, in small pieces; it is torch's alone."""
    monkeypatch.setattr(dispatch, "on_gpu", lambda _: request.param)
    monkeypatch.setattr(logprobs, "CELLS", 20_000)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 37), (5, 8209), (CHUNK + 3, 131), (700, 64)])
@pytest.mark.parametrize("ties", [False, True])
def test_chosen_rank_and_top(rows: int, vocabulary: int, ties: bool) -> None:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows)) * 4
    if ties:
        logits = logits.round()
        logits[:, ::5] = -torch.inf
        logits[::3] = 0.0 * logits[::3].sign().nan_to_num(1.0)  # zeros of either sign
    before = logits.clone()
    chosen = [(7 * i + 3) % vocabulary for i in range(rows)]
    counts = [(0, 5, 1, 20)[i % 4] for i in range(rows)]
    reference = torch.log_softmax(logits.double(), dim=1)
    asked = [i % 3 < 2 for i in range(rows)]
    entropies = torch.distributions.Categorical(logits=logits.double()).entropy()
    for i, found in enumerate(token_logprobs(logits, chosen, counts, asked)):
        assert (found.entropy is None) != asked[i]
        assert not asked[i] or found.entropy == pytest.approx(float(entropies[i]), abs=3e-6)
        assert found.token_id == chosen[i]
        assert found.logprob == pytest.approx(float(reference[i, chosen[i]]), abs=2e-6)
        assert found.rank == 1 + int((logits[i] > logits[i, chosen[i]]).sum())
        order = torch.argsort(logits[i], descending=True, stable=True)[: counts[i]].tolist()
        assert [t.token_id for t in found.top] == order
        wanted = reference[i, order].tolist()
        assert [t.logprob for t in found.top] == pytest.approx(wanted, abs=2e-6)
    assert torch.equal(logits, before)


@pytest.mark.usefixtures("on_gpu")
def test_more_candidates_than_the_vocabulary_holds() -> None:
    (found,) = prompt_logprobs(torch.tensor([[0.5, 1.5, -1.0]]), [2], top=20)
    assert [t.token_id for t in found.top] == [1, 0, 2]
    assert found.rank == 3
    assert sum(torch.tensor([t.logprob for t in found.top]).exp().tolist()) == pytest.approx(1.0, abs=1e-6)
