"""Log-probabilities of tokens, as the model gives them.

    logprob[t] = z[t] - log Σ exp z        rank[t] = 1 + number of tokens with larger z

z are the raw logits: before temperature, penalties, bias and truncation (what vLLM calls raw log-probabilities),
so that the figure does not depend on how the token was chosen and equals what scoring the same text would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lorry.server.decoding.rowwise import nth_equal, top_values
from lorry.server.params import TokenLogprob, TokenLogprobs

CHUNK = 16  # rows in work at once: bounds the memory of a long prompt, 16 × 128k × 4 bytes = 8 MB


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> list[TokenLogprobs]:
    """The log-probability of one token per row, its rank, and the most likely tokens.

    logits: float32 [R, V], raw; not changed
    token_ids: R ids below V
    top: how many of the most likely tokens each row reports, most likely first, of equals the smallest id
        first
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(logits), CHUNK):
        rows = slice(start, start + CHUNK)
        found += _chunk(logits[rows], token_ids[rows], top[rows])
    return found


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """The log-probabilities of prompt tokens: row i holds the logits that predict `token_ids[i]`.

    logits: float32 [T, V], raw, of the positions before the tokens; the first token of a text has none
    token_ids: T ids below V
    top: how many of the most likely tokens are reported in each place
    """
    return token_logprobs(logits, token_ids, [top] * len(token_ids))


def _chunk(logits: Tensor, token_ids: Sequence[int], top: Sequence[int]) -> Iterator[TokenLogprobs]:
    logprobs = torch.log_softmax(logits, dim=1)
    ids = torch.tensor(list(token_ids), device=logits.device)[:, None]
    chosen = logprobs.gather(1, ids)[:, 0].tolist()
    ranks = ((logits > logits.gather(1, ids)).sum(dim=1) + 1).tolist()
    best = _most_likely(logits, logprobs, max(top))
    for token_id, logprob, rank, row, count in zip(token_ids, chosen, ranks, best, top, strict=True):
        yield TokenLogprobs(token_id, logprob, rank, tuple(row[:count]))


def _most_likely(logits: Tensor, logprobs: Tensor, count: int) -> list[list[TokenLogprob]]:
    if count == 0:
        return [[] for _ in logits]
    values = top_values(logits, count)
    columns = []
    for place in range(values.shape[1]):
        nth = np.argmax(values == values[:, place, None], axis=1)
        columns.append(nth_equal(logits, values[:, place].copy(), place - nth))
    ids = torch.from_numpy(np.stack(columns, axis=1))
    found = logprobs.gather(1, ids.to(logprobs.device)).tolist()
    return [
        [TokenLogprob(token_id, logprob) for token_id, logprob in zip(*row, strict=True)]
        for row in zip(ids.tolist(), found, strict=True)
    ]
