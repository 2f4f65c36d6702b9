"""What test_sampling.py looks at in the assembly: a batch of 64 rows of Llama-3's vocabulary."""

from __future__ import annotations

import torch

from lorry.kernels.sampling import Draws, SamplingRows, TokenValues
from lorry.kernels.triton.penalties import penalize
from lorry.kernels.triton.sampling import sample

ROWS, VOCABULARY = 64, 128256


def _sample(dtype: torch.dtype) -> None:
    rows = SamplingRows(
        torch.empty(ROWS),
        torch.empty(ROWS, dtype=torch.int32),
        torch.empty(ROWS, dtype=torch.float64),
        torch.empty(ROWS, dtype=torch.float64),
    )
    seeds, indices, positions = (torch.empty(ROWS, dtype=torch.int64) for _ in range(3))
    sample(torch.empty(ROWS, VOCABULARY, dtype=dtype), rows, Draws(seeds, indices, positions))


def _penalize() -> None:
    lists = [
        TokenValues(torch.empty(ROWS + 1, dtype=torch.int32), torch.empty(4096, dtype=torch.int32), torch.empty(4096))
        for _ in range(2)
    ]
    last = torch.empty(ROWS, dtype=torch.int64)
    penalize(torch.empty(ROWS, VOCABULARY), *lists, torch.empty(ROWS), torch.empty(ROWS), torch.empty(ROWS), last)


CASES = {
    "sample float32": lambda: _sample(torch.float32),
    "sample bfloat16": lambda: _sample(torch.bfloat16),
    "penalize": _penalize,
}
