"""Whole matrices and rows of tokens in place of the base's, as factors and a gain that takes the base's away.

    W' [N, K]      y = 0 ⊙ y0 + B A x + b'        B A = W' I where K <= N, else I W'
    E'[t] = Δ_j    e = E[t] + B A 1_t             A[j] = 1_{t_j}ᵀ, B[:, j] = Δ_j - E[t_j]
    the same rows of a head
                   z = (1 - Σ_j 1_{t_j}) ⊙ z0 + B A h     A[j] = Δ_j, B[:, j] = 1_{t_j}

1_t: the vector that is one at t and else zero. The embedding is a linear of such vectors, E'ᵀ its matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorry.adapters.errors import MalformedAdapter, WrongBase
from lorry.adapters.layout import Linear, ModelLayout
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.checkpoint import LinearTensors
from lorry.adapters.reading.targets import EMBEDDING, HEAD
from lorry.adapters.reading.update import Update

_ROWS = 4096  # of a table compared at a time


def own_matrix(linear: Linear, path: str, tensors: LinearTensors, base: BaseWeights) -> Update:
    """The update of a linear that has a matrix of its own, and a bias where the base has one; raises WrongBase."""
    weight = tensors.weight
    assert weight is not None
    if (tensors.bias is None) is not (base.bias(linear) is None):
        has = "a bias" if tensors.bias is None else "no bias"
        raise WrongBase(f"{path}.bias: this base has {has} there, unlike the adapter's module", f"{path}.bias")
    update = _of_matrix(weight.T if linear == EMBEDDING else weight)
    return Update(update.a, update.b, 1.0, update.gain, None if tensors.bias is None else tensors.bias.float())


def _of_matrix(weight: Tensor) -> Update:
    """weight: [N, K]."""
    outputs, inputs = weight.shape
    gain = torch.full((outputs,), -1.0)
    if inputs <= outputs:
        return Update(torch.eye(inputs, dtype=weight.dtype), weight, 1.0, gain)
    return Update(weight, torch.eye(outputs, dtype=weight.dtype), 1.0, gain)


def token_rows(linear: Linear, tensors: LinearTensors, base: BaseWeights) -> Update:
    """The update of an end some of whose rows are the adapter's; as a matrix where these are more than its columns."""
    rows, ids = tensors.rows, torch.tensor(tensors.row_ids)
    assert rows is not None
    if len(ids) > rows.shape[1]:
        everything = torch.arange(base.vocab_size)
        whole = base.embedding(everything) if linear == EMBEDDING else base.head(everything)
        whole[ids] = rows.float()
        return _of_matrix(whole.T if linear == EMBEDDING else whole)
    if linear == HEAD:
        vocabulary = base.vocab_size
        gain = torch.zeros(vocabulary)
        gain[ids] = -1.0
        return Update(rows, _one_hot(ids, vocabulary).T, 1.0, gain)
    before = base.embedding(ids)
    return Update(_one_hot(ids, base.vocab_size), (rows.float() - before).T, 1.0)


def _one_hot(ids: Tensor, vocabulary: int) -> Tensor:
    """bool [n, V]"""
    found = torch.zeros(len(ids), vocabulary, dtype=torch.bool)
    found[torch.arange(len(ids)), ids] = True
    return found


def without_the_bases(
    tensors: Mapping[Linear, LinearTensors], layout: ModelLayout, base: BaseWeights
) -> dict[Linear, LinearTensors]:
    """Without the matrices of embedding and head that PEFT has saved beside the adapter's tensors.

    Where they are others than this base's, PEFT loads them over the base: then they are the adapter's own. Raises
    WrongBase where something else is added to such a one, MalformedAdapter for two of one matrix.
    """
    settled = dict(tensors)
    both = [tensors[end].saved for end in (EMBEDDING, HEAD) if layout.tied and end in tensors]
    saved = [each for each in both if each is not None]
    if len(saved) == 2 and not torch.equal(*saved):
        path = layout.module_path(*HEAD)
        raise MalformedAdapter(f"the file's matrix of {path} is not the embedding's, which it is tied to", path)
    for linear, own in tensors.items():
        if own.saved is None:
            continue
        alone = replace(own, saved=None)
        if is_the_bases(linear, own.saved, base):
            settled[linear] = alone
            continue
        for end in (EMBEDDING, HEAD) if layout.tied else (linear,):
            other = settled.get(end)
            if other is not None and not replace(other, saved=None, weight=None).empty:
                path = layout.module_path(*linear)
                raise WrongBase(f"the file's matrix of {path} beside what is added to it is not this base's", path)
            settled[end] = LinearTensors(layout.shape(end[1])[0], weight=own.saved)
    return {linear: own for linear, own in settled.items() if not own.empty}


def is_the_bases(linear: Linear, saved: Tensor, base: BaseWeights) -> bool:
    """Whether a matrix of the embedding or the head, [V, H], is what the base has: number by number as they are, or
    both rounded to bfloat16 or to float16, in which the trainer or the base may have had it."""
    left = {torch.float32, torch.bfloat16, torch.float16}
    for first in range(0, base.vocab_size, _ROWS):
        ids = torch.arange(first, min(first + _ROWS, base.vocab_size))
        own = base.embedding(ids) if linear == EMBEDDING else base.head(ids)
        rows = saved[first : first + _ROWS]
        left = {dtype for dtype in left if torch.equal(rows.to(dtype), own.to(dtype))}
        if not left:
            return False
    return True
