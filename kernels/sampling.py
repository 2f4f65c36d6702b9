"""From logits to one token per row without a look at the host: penalties, truncation, draw.

    z[t] += bias[t]
    z[t]  = (z[t] < 0 ? z[t] r : z[t] / r) - (presence [c(t) > 0] + frequency c(t))     t in the row's list, c its count
                                             in the output, of which the last token may be known to the device only
    p[t] ∝ exp(z[t] / T)  on what is left after  top-k → top-p → min-p;  T = 0: the first of the largest z
    token = first t with  Σ p over t and what comes before it  >  u

with the conditions of `lorry.server.decoding` and the same u for the same (seed, index, position), so that a seed gives
the same token on a CPU and on a GPU, unless u lies within rounding of a boundary:

    top-k: z[t] >= the k-th largest z        top-p: Σ p over larger z < top_p, of what top-k left
    min-p: p[t] >= min_p · max p             equal z are kept or dropped together

What comes before a token: all of larger z and the equal ones of smaller id. In rows without truncation, and in those
that keep `SORTED` tokens or more of a longer vocabulary, or whose top-k leaves that many to top-p: the tokens of
smaller id.

Sources: top-p: Holtzman et al. 2020 (arXiv:1904.09751); min-p: Nguyen et al. 2024 (arXiv:2407.01082); repetition
penalty: Keskar et al. 2019 (arXiv:1909.05858).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorry.kernels import dispatch, native, philox, vocabulary

SORTED = 2048  # rows that keep fewer tokens are drawn from in the order of falling z
TINY = 1e-30  # least temperature above 0
_LIST = (torch.int32, torch.int32, torch.float32)
_PENALIZE = (*_LIST, *_LIST, *[torch.float32] * 3, torch.int64)  # of the arguments behind the logits


@dataclass(frozen=True)
class SamplingRows:
    """How the token of each row is chosen; all tensors [R].

    temperature: float32, 0 for greedy; top_k: int32, 0 or past the vocabulary: off; top_p: float64, 1: off;
    min_p: float64, 0: off
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class Draws:
    """Which random number a row draws; all int64 [R].

    seeds: the 64 bits of an unsigned number; indices: of the sequence within its request, < 2³²; positions: how many
    tokens the sequence has put out
    """

    seeds: Tensor
    indices: Tensor
    positions: Tensor


@dataclass(frozen=True)
class TokenValues:
    """A list of tokens, each with a number, for every row.

    starts: int32 [R + 1], row r owns entries starts[r] up to starts[r + 1]; token_ids: int32 [E], distinct within a row
    and inside the vocabulary; values: float32 [E]. E may be larger than starts[R].
    """

    starts: Tensor
    token_ids: Tensor
    values: Tensor


def uniforms(draws: Draws) -> Tensor:
    """The numbers of `lorry.kernels.philox` in its stream of tokens, on the CPU: float64 [R] in [0, 1)."""
    seeds, indices, positions = (
        column.cpu().numpy().view(np.uint64) for column in (draws.seeds, draws.indices, draws.positions)
    )
    return torch.from_numpy(philox.uniforms(seeds, indices, positions))


def sample_reference(
    logits: Tensor, rows: SamplingRows, uniform: Tensor, raw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As in `sample`, row by row in float64; uniform: float64 [R]."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for row in range(len(logits)):
        settings = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniform)
        temperature, top_k, top_p, min_p, u = (values[row].item() for values in settings)
        tokens[row] = _choose(logits[row].float(), temperature, int(top_k), top_p, min_p, u)
    logprobs = torch.log_softmax((logits if raw is None else raw).double(), dim=1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0].float()


def _choose(z: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    if not z.max().isfinite():
        return 0
    if temperature == 0:
        return int((z == z.max()).nonzero()[0, 0])
    kept, falling = kept_tokens(z, temperature, top_k, top_p, min_p)
    if falling:
        kept = kept[torch.argsort(z[kept], descending=True, stable=True)]
    cumulative = weights(z, temperature)[kept].cumsum(0)
    above = (cumulative > u * cumulative[-1]).nonzero()
    place = above[0, 0] if len(above) else (cumulative == cumulative[-1]).nonzero()[0, 0]
    return int(kept[place])


def weights(z: Tensor, temperature: float) -> Tensor:
    """exp((z - max z) / T); z float32 [V] -> float64 [V]."""
    return torch.exp((z - z.max()).double() / max(temperature, TINY))


def kept_tokens(z: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, bool]:
    """What top-k, top-p and min-p leave of a row, z float32 [V]: int64 ids, rising; whether to draw by falling z."""
    vocabulary = len(z)
    ids = torch.arange(vocabulary, device=z.device)
    if not (top_k > 0 or top_p < 1 or min_p > 0):
        return ids, False
    w = weights(z, temperature)
    order = torch.argsort(z, descending=True, stable=True)
    cumulative = w[order].cumsum(0)
    limit = top_k if 0 < top_k < vocabulary else vocabulary
    least = z[order[limit - 1]]
    candidates = int((z >= least).sum())
    if top_p < 1:
        ahead = cumulative - w[order]
        nucleus = max(1, int((ahead < top_p * cumulative[candidates - 1]).sum()))
        least = torch.maximum(least, z[order[nucleus - 1]])
    kept = ids[(z >= least) & ((w >= min_p) | (z == z.max()))]
    whole = limit == vocabulary
    falling = len(kept) < SORTED and (top_p >= 1 or whole or candidates < SORTED)
    return kept, falling or vocabulary <= SORTED


def sample(
    logits: Tensor, rows: SamplingRows, draws: Draws | Tensor, raw: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose one token per row.

    logits: float32 or bfloat16 [R, V], contiguous rows, any row stride, after the penalties. A row of -inf alone gives
    token 0; one with NaN or +inf some token of the vocabulary, and harms no other
    draws: what the random numbers depend on, or the numbers, float64 [R] in [0, 1)
    raw: as logits, what the log-probability is of; None: logits
    Returns (token ids int64 [R], log softmax(raw)[token] float32 [R]). Nothing waits for the device.
    """
    _check(logits, rows)
    if dispatch.on_gpu(logits):
        from lorry.kernels.triton import sampling as gpu

        return gpu.sample(logits, rows, draws, raw)
    return sample_reference(logits, rows, draws if isinstance(draws, Tensor) else uniforms(draws), raw)


def penalize_reference(
    logits: Tensor,
    bias: TokenValues | None,
    counts: TokenValues | None,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    last: Tensor | None = None,
) -> None:
    """As in `penalize`, row by row; every step is rounded to the dtype of logits as the kernel does."""
    for row, z in enumerate(logits):
        if bias is not None:
            part = slice(*bias.starts[row : row + 2].tolist())
            ids = bias.token_ids[part].long()
            z[ids] = (z[ids].float() + bias.values[part]).to(z.dtype)
        if counts is not None:
            part = slice(*counts.starts[row : row + 2].tolist())
            ids, count = counts.token_ids[part].long(), counts.values[part]
            if last is not None and (token := last[row]) >= 0:
                count = count + (ids == token)
                if not (ids == token).any():
                    ids, count = torch.cat((ids, token[None])), torch.cat((count, count.new_ones(1)))
            scores = z[ids].float()
            scores = torch.where(scores < 0, scores * repetition[row], scores / repetition[row])
            z[ids] = (scores - (presence[row] * (count > 0) + frequency[row] * count)).to(z.dtype)


def penalize(
    logits: Tensor,
    bias: TokenValues | None,
    counts: TokenValues | None,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    last: Tensor | None = None,
) -> None:
    """Add the bias, then apply repetition, presence and frequency penalties, in place.

    logits: float32 or bfloat16 [R, V], contiguous rows, any row stride; bias: what is added, -inf to forbid a token
    counts: every token of the prompt and the output once, its value how often the output holds it
    repetition (1: off), presence, frequency (0: off): float32 [R]; rows whose penalties are off stay as they are
    last: int64 [R], one more token of the output, which counts do not know of; below 0: none
    """
    if dispatch.on_gpu(logits):
        from lorry.kernels.triton import penalties as gpu

        gpu.penalize(logits, bias, counts, repetition, presence, frequency, last)
        return
    if not vocabulary.serves(logits):
        penalize_reference(logits, bias, counts, repetition, presence, frequency, last)
        return
    library = native.library()
    assert library is not None
    lists = [x for part in (bias, counts) for x in ((part.starts, part.token_ids, part.values) if part else [None] * 3)]
    arguments = (*lists, repetition, presence, frequency, last)
    for x, dtype in zip(arguments, _PENALIZE, strict=True):
        if x is not None and (x.dtype is not dtype or not x.is_contiguous()):
            raise ValueError(f"a list or a penalty must be {dtype} and contiguous, got {x.dtype} {x.stride()}")
    pointers = (x if x is None else x.data_ptr() for x in arguments)
    native.check(library.penalize(logits.data_ptr(), *logits.shape, *pointers))


def _check(logits: Tensor, rows: SamplingRows) -> None:
    for name, dtype in (
        ("temperature", torch.float32),
        ("top_k", torch.int32),
        ("top_p", torch.float64),
        ("min_p", torch.float64),
    ):
        values = getattr(rows, name)
        if values.dtype is not dtype or values.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be {dtype} [{len(logits)}], got {values.dtype} {list(values.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16) or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 or bfloat16 with contiguous rows, got {logits.dtype}")
