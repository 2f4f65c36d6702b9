"""Sampling at 64 x 128k, and the penalties before it, against the bytes of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gpu.measure import Case, Figure, Stage, Wrong
from torch import Tensor

from lorry.kernels.sampling import SamplingRows, TokenValues, penalize_reference, sample_reference

ROWS, VOCABULARY = 64, 128256
KINDS: dict[str, tuple[float, int, float, float]] = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k 50": (0.8, 50, 1.0, 0.0),
    "top-p 0.9": (0.8, 0, 0.9, 0.0),
    "min-p 0.05": (1.0, 0, 1.0, 0.05),
    "all three": (1.0, 200, 0.95, 0.01),
    "top-k 5000, by chunks": (1.5, 5000, 0.99, 0.0),  # what the list does not hold
}
DISAGREEING = 2  # rows whose number may lie within rounding of a boundary


def rows_of(stage: Stage, rows: int, kind: str) -> SamplingRows:
    temperature, top_k, top_p, min_p = KINDS[kind]
    return SamplingRows(
        torch.full((rows,), temperature, device=stage.device),
        torch.full((rows,), top_k, dtype=torch.int32, device=stage.device),
        torch.full((rows,), top_p, dtype=torch.float64, device=stage.device),
        torch.full((rows,), min_p, dtype=torch.float64, device=stage.device),
    )


def torch_sample(z: Tensor, kind: str) -> Tensor | None:
    """What torch offers for the simpler kinds."""
    if kind == "greedy":
        return z.argmax(1)
    if kind == "temperature":
        return torch.multinomial(torch.softmax(z / 0.8, 1), 1)
    if kind == "top-k 50":
        values, ids = z.topk(50)
        return ids.gather(1, torch.multinomial(torch.softmax(values / 0.8, 1), 1))
    if kind == "top-p 0.9":
        p, ids = torch.softmax(z / 0.8, 1).sort(1, descending=True)
        p = torch.where(p.cumsum(1) - p < 0.9, p, 0.0)
        return ids.gather(1, torch.multinomial(p, 1))
    return None


@torch.inference_mode()
def sampling(stage: Stage, dtype: torch.dtype) -> Iterator[Figure]:
    from lorry.kernels.triton.sampling import sample

    rows, vocabulary = stage.pick((ROWS, VOCABULARY), (2, 517))
    nbytes = rows * vocabulary * dtype.itemsize
    copies = [stage.randn(rows, vocabulary, scale=2.5, dtype=dtype) for _ in range(stage.copies(nbytes))]
    uniform = torch.rand(rows, dtype=torch.float64, device=stage.device)
    for kind in KINDS:
        parameters = rows_of(stage, rows, kind)
        tokens, _ = sample(copies[0], parameters, uniform)
        wanted, _ = sample_reference(copies[0], parameters, uniform)
        if int((tokens != wanted).sum()) > DISAGREEING:
            raise Wrong(f"sampling, {kind}: {int((tokens != wanted).sum())} of {rows} tokens are not the reference's")
        figure = Figure("sampling", f"{kind}, {vocabulary} x {str(dtype).removeprefix('torch.')}", rows, None, nbytes)
        figure.seconds = stage.time([partial(sample, z, parameters, uniform) for z in copies], figure.eager)
        if torch_sample(copies[0], kind) is not None:
            peer = [partial(torch_sample, z.float(), kind) for z in copies]
            figure.peers["torch"] = stage.time(peer, figure.eager, "torch")
        yield figure


@torch.inference_mode()
def penalties(stage: Stage) -> Iterator[Figure]:
    from lorry.kernels.triton.penalties import penalize

    rows, vocabulary, entries = stage.pick((ROWS, VOCABULARY, 2000), (2, 517, 30))
    ids = torch.cat([torch.randperm(vocabulary)[:entries] for _ in range(rows)]).int().to(stage.device)
    starts = torch.arange(0, rows * entries + 1, entries, dtype=torch.int32, device=stage.device)
    counts = TokenValues(starts, ids, torch.randint(0, 4, ids.shape, device=stage.device).float())
    parameters = [torch.full((rows,), value, device=stage.device) for value in (1.1, 0.2, 0.3)]
    moved = ids.numel() * (4 + 4 + 2 * 32)  # id, count, a sector of logits read and written
    copies = [stage.randn(rows, vocabulary, dtype=torch.float32) for _ in range(stage.copies(moved, most=16))]
    actual, expected = copies[0].clone(), copies[0].clone()
    penalize(actual, None, counts, *parameters)
    penalize_reference(expected, None, counts, *parameters)
    if not torch.equal(actual, expected):
        raise Wrong("penalties: not the bits of the reference")
    figure = Figure("penalties", f"{entries} tokens a row", rows, None, moved)
    figure.seconds = stage.time([partial(penalize, z, None, counts, *parameters) for z in copies], figure.eager)
    yield figure


CASES: dict[str, Case] = {
    "sampling float32": partial(sampling, dtype=torch.float32),
    "sampling bfloat16": partial(sampling, dtype=torch.bfloat16),
    "penalties": penalties,
}
