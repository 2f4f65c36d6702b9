"""The compiled bias and penalties against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorry.kernels.sampling import TokenValues, penalize, penalize_reference

VOCABULARY = 997
pytestmark = pytest.mark.usefixtures("kernels")


def lists_of(sizes: list[int], whole: bool) -> TokenValues:
    """Distinct tokens for each row; `whole`: with counts for numbers."""
    ids = [torch.randperm(VOCABULARY)[:size].to(torch.int32) for size in sizes]
    starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    values = torch.randint(0, 4, (sum(sizes),)).float() if whole else torch.randn(sum(sizes))
    return TokenValues(starts, torch.cat(ids), values)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
@pytest.mark.parametrize("with_last", [True, False])
def test_bits_of_the_reference(with_bias: bool, with_counts: bool, with_last: bool) -> None:
    bias = lists_of([3, 0, 40, 1, 997], whole=False) if with_bias else None
    counts = lists_of([0, 5, 997, 1, 300], whole=True) if with_counts else None
    parameters = [torch.tensor(column) for column in zip((1.0, 0.0, 0.0), *[(1.3, 0.4, -0.7)] * 4, strict=True)]
    last = torch.tensor([-1, 8, 9, -1, 10]) if with_last else None
    logits = torch.randn(5, VOCABULARY) * 4
    logits[2, ::5] = -torch.inf
    found, wanted = logits.clone(), logits.clone()
    penalize(found, bias, counts, *parameters, last)
    penalize_reference(wanted, bias, counts, *parameters, last)
    assert torch.equal(found, wanted)
    assert torch.equal(found, logits) == (not with_bias and not with_counts)


def test_lists_of_another_type_are_refused() -> None:
    """C would read them as something else."""
    lists, logits = lists_of([3, 0], whole=True), torch.zeros(2, VOCABULARY)
    off = torch.ones(2), torch.zeros(2), torch.zeros(2)
    with pytest.raises(ValueError, match="int32 and contiguous, got torch"):
        penalize(logits, replace(lists, token_ids=lists.token_ids.long()), None, *off)
    with pytest.raises(ValueError, match="float32 and contiguous, got torch"):
        penalize(logits, None, lists, torch.ones(4)[::2], *off[1:])
    assert not logits.any()
