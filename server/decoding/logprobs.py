"""Log-probabilities of tokens, as the model gives them.

    logprob[t] = z[t] - log Σ exp z        rank[t] = 1 + number of tokens with larger z
    entropy = -Σ p log p                   p = exp logprob, in nats

z are the raw logits: before temperature, penalties, bias and truncation (what vLLM calls raw log-probabilities),
so that the figure does not depend on how the token was chosen and equals what scoring the same text would give.

On a CPU `token_logprobs` answers by numpy; on a GPU `figures` makes one table without a wait, and `reports` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.kernels import dispatch
from lorry.kernels.transfer import to_device
from lorry.server.decoding.rowwise import nth_equal, top_values
from lorry.server.params import TokenLogprob, TokenLogprobs

CHUNK = 16  # rows in work at once: bounds the memory of a long prompt, 16 × 128k × 4 bytes = 8 MB
CELLS = 2**22  # logits in work at once on a GPU: about 5 bytes for each
BLOCK = 32  # logits under one maximum, where the most likely ones are looked for on a GPU


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], top: Sequence[int], entropies: Sequence[bool] = ()
) -> list[TokenLogprobs]:
    """The log-probability of one token per row, its rank, and the most likely tokens.

    logits: float32 [R, V], raw; not changed
    token_ids: R ids below V
    top: how many of the most likely tokens each row reports, most likely first, of equals the smallest id
        first
    entropies: whether each row reports its entropy; (): none does
    """
    entropies = entropies or [False] * len(top)
    if dispatch.on_gpu(logits):
        (ids,) = to_device([np.array(token_ids, np.int64)], logits.device)
        table = figures(logits, ids, max(top, default=0), any(entropies))
        return reports(table.cpu(), top, entropies)
    found: list[TokenLogprobs] = []
    for start in range(0, len(logits), CHUNK):
        rows = slice(start, start + CHUNK)
        found += _chunk(logits[rows], token_ids[rows], top[rows], entropies[rows])
    return found


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """The log-probabilities of prompt tokens: row i holds the logits that predict `token_ids[i]`.

    logits: float32 [T, V], raw, of the positions before the tokens; the first token of a text has none
    token_ids: T ids below V
    top: how many of the most likely tokens are reported in each place
    """
    return token_logprobs(logits, token_ids, [top] * len(token_ids))


def figures(logits: Tensor, token_ids: Tensor, top: int, entropies: bool = False) -> Tensor:
    """As `token_logprobs`, one table on the device of the logits; the host reads nothing.

    logits: float32 [R, V], raw; not changed
    token_ids: int64 [R], below V; top: how many of the most likely tokens, K = min(top, V)
    entropies: whether rows report theirs
    Returns float64 [R, 4 + 2 K]: the token, its log-probability, its rank, the entropy; the K ids, their
    log-probabilities.
    """
    rows, vocabulary = logits.shape
    top = min(top, vocabulary)
    table = torch.empty(rows, 4 + 2 * top, dtype=torch.float64, device=logits.device)
    step = max(1, CELLS // vocabulary)
    for start in range(0, rows, step):
        part, ids = logits[start : start + step], token_ids[start : start + step, None]
        into = table[start : start + step]
        logprobs = torch.log_softmax(part, dim=1)
        into[:, :1] = ids
        into[:, 1:2] = logprobs.gather(1, ids)
        into[:, 2] = (part > part.gather(1, ids)).sum(dim=1) + 1
        into[:, 3] = _entropy(logprobs) if entropies else torch.nan
        if top:
            best = _best(part, top)
            into[:, 4 : 4 + top] = best
            into[:, 4 + top :] = logprobs.gather(1, best)
    return table


def reports(table: Tensor, top: Sequence[int], entropies: Sequence[bool]) -> list[TokenLogprobs]:
    """What `figures` found, on the host.

    top, entropies: how many of the most likely tokens each row reports, and whether its entropy
    """
    widest = (table.shape[1] - 4) // 2
    found = []
    for (token, logprob, rank, entropy, *best), count, asked in zip(table.tolist(), top, entropies, strict=True):
        pairs = zip(best[:widest][:count], best[widest:][:count], strict=True)
        likely = tuple(TokenLogprob(int(token_id), value) for token_id, value in pairs)
        found.append(TokenLogprobs(int(token), logprob, int(rank), likely, entropy if asked else None))
    return found


def _best(logits: Tensor, count: int) -> Tensor:
    """The ids of each row's `count` largest, falling, of equals the smallest id first.

    The block with the k-th largest maximum, of equals the first block, holds none of the k - 1 largest that are not in
    blocks before it: so `count` blocks hold what is wanted.
    logits: float32 [R, V]; count <= V. Returns int64 [R, count]; ids below V, even where a row holds NaN.
    """
    rows, vocabulary = logits.shape
    if vocabulary % BLOCK:
        logits = torch.nn.functional.pad(logits, (0, BLOCK - vocabulary % BLOCK), value=-torch.inf)
    blocks = logits.view(rows, -1, BLOCK)
    chosen = first_largest(blocks.amax(dim=2), min(count, blocks.shape[1])).sort(dim=1).values
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK))
    place = first_largest(inside.flatten(1), count)
    return (chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK).clamp_(max=vocabulary - 1)


def first_largest(values: Tensor, count: int) -> Tensor:
    """The places of the `count` largest, falling, of equals the first; float32 [R, C] -> int64 [R, count].

    topk promises no order of equals, so it gets distinct integers: the float's bits, ordered, above the place's.
    """
    bits = (values + 0.0).view(torch.int32)  # -0 is 0
    order = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    width = values.shape[1]
    keys = order * 2**32 + torch.arange(width - 1, -1, -1, device=values.device)
    return width - 1 - (keys.topk(count, dim=1).values & 0xFFFFFFFF)


def _entropy(logprobs: Tensor) -> Tensor:
    """-Σ p log p, float32 [R]; what is impossible adds nothing."""
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(dim=1)


def _chunk(
    logits: Tensor, token_ids: Sequence[int], top: Sequence[int], entropies: Sequence[bool]
) -> Iterator[TokenLogprobs]:
    logprobs = torch.log_softmax(logits, dim=1)
    ids = torch.tensor(list(token_ids))[:, None]
    chosen = logprobs.gather(1, ids)[:, 0].tolist()
    ranks = ((logits > logits.gather(1, ids)).sum(dim=1) + 1).tolist()
    best = _most_likely(logits, logprobs, max(top))
    measured = [
        float(_entropy(row[None])[0]) if asked else None for row, asked in zip(logprobs, entropies, strict=True)
    ]
    for token_id, logprob, rank, row, count, entropy in zip(token_ids, chosen, ranks, best, top, measured, strict=True):
        yield TokenLogprobs(token_id, logprob, rank, tuple(row[:count]), entropy)


def _most_likely(logits: Tensor, logprobs: Tensor, count: int) -> list[list[TokenLogprob]]:
    if count == 0:
        return [[] for _ in logits]
    values = top_values(logits, count)
    columns = []
    for place in range(values.shape[1]):
        nth = np.argmax(values == values[:, place, None], axis=1)
        columns.append(nth_equal(logits, values[:, place].copy(), place - nth))
    ids = torch.from_numpy(np.stack(columns, axis=1))
    found = logprobs.gather(1, ids).tolist()
    return [
        [TokenLogprob(token_id, logprob) for token_id, logprob in zip(*row, strict=True)]
        for row in zip(ids.tolist(), found, strict=True)
    ]
