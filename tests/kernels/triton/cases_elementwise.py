"""Launches of rms_norm and silu_mul in the shapes of Llama-3-8B and Qwen3, to be compiled; see assembly.py."""

from __future__ import annotations

from functools import partial

import torch

from lorry.kernels.triton.rms_norm import rms_norm
from lorry.kernels.triton.silu_mul import silu_mul


def norm(rows: int, width: int, residual: bool) -> None:
    x = torch.empty(rows, width, dtype=torch.bfloat16)
    rms_norm(x, torch.empty(width, dtype=torch.bfloat16), 1e-5, x if residual else None)


def heads(rows: int) -> None:
    qkv = torch.empty(rows, 48, 128, dtype=torch.bfloat16)
    rms_norm(qkv[:, :32], torch.empty(128, dtype=torch.bfloat16), 1e-6)


def gated(rows: int, width: int) -> None:
    silu_mul(torch.empty(rows, 2 * width, dtype=torch.bfloat16))


CASES = {
    "rms_norm": partial(norm, 64, 4096, residual=False),
    "rms_norm residual": partial(norm, 64, 4096, residual=True),
    "rms_norm heads": partial(heads, 64),
    "silu_mul": partial(gated, 64, 14336),
}
