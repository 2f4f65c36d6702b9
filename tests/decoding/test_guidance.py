"""The mix of two distributions, and what is chosen from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from lorry.server.decoding.guidance import Guiding, guided
from lorry.server.decoding.sampling import Sampling
from lorry.server.params import Guidance

VOCABULARY = 40


class Given(UnbatchedClassifierFreeGuidanceLogitsProcessor):  # type: ignore[misc]
    """transformers', whose other model is a table."""

    def __init__(self, scale: float, negative: torch.Tensor) -> None:
        super().__init__(scale, model=None)
        self.negative = negative

    def get_unconditional_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.negative[:, None]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7, 20.0])
def test_the_mix_is_that_of_transformers(scale: float) -> None:
    torch.manual_seed(0)
    logits, negative = torch.randn(2, 5, VOCABULARY) * 3
    theirs = Given(scale, negative)(torch.zeros(5, 1, dtype=torch.int64), logits)
    ours = guided(logits, negative, torch.full((5,), scale))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_what_is_impossible_stays_so() -> None:
    logits, negative = torch.zeros(2, 1, 3)
    logits[0, 0] = negative[0, 0] = negative[0, 1] = -torch.inf
    found = guided(logits, negative, torch.tensor([3.0]))
    assert found[0, 0] == -torch.inf and found[0, 1:].isfinite().all()


def test_each_pair_is_chosen_for_as_its_mix_alone(make_row: Any) -> None:
    """By sampling, with its processors and log-probabilities; pairs may stand apart."""
    torch.manual_seed(1)
    logits = torch.randn(6, VOCABULARY) * 2
    scales = (0.5, 1.5, 4.0)
    pairs = []
    for key, scale in enumerate(scales):
        asked = {"search": Guidance(scale), "seed": key, "repetition_penalty": 1.4, "logprobs": 2, "top_p": 0.9}
        pairs.append([make_row(key=2 * key + index, index=index, output=[3, 4], **asked) for index in (0, 1)])
    for pair, group in zip(pairs, (7, 8, 9), strict=True):
        pair[:] = [type(row)(**{name: getattr(row, name) for name in row.__slots__} | {"group": group}) for row in pair]
    order = [(2, 1), (0, 1), (1, 0), (0, 0), (1, 1), (2, 0)]
    rows = [pairs[pair][index] for pair, index in order]
    ways = Guiding(Sampling()).decide(rows, logits.clone())
    assert [way.parent for way in ways] == list(range(6))
    for pair, scale in enumerate(scales):
        own, shadow = order.index((pair, 0)), order.index((pair, 1))
        mix = guided(logits[[own]], logits[[shadow]], torch.tensor([scale]))
        (alone,) = Sampling().decide([rows[own]], mix)
        assert ways[own].token_ids == ways[shadow].token_ids == alone.token_ids
        assert ways[own].logprobs == alone.logprobs and ways[shadow].logprobs is None
