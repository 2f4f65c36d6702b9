"""PEFT's methods as rank pages and vectors: what each makes of its tensors, before they are cut into pages.

    LoRA        y = y0 + s B A x                                                            y0 = W0 x + b0
    lora_bias   y = y0 + s (B A x + b_B)
    bias        y = y0 + s B A x + (b' - b0)                     b' the adapter's own bias
    DoRA        y = c ⊙ (W0 x + s B A x) + b'                    c = m / ‖W0 + s B A‖ of each row (arXiv:2402.09353)
                  = c ⊙ y0 + s (c ⊙ B) A x + (b' - c ⊙ b0)       b' = b0 where the adapter has none
    QA-LoRA     A x̄,  x̄ the sums of g neighbours of x / g · K/g   (arXiv:2309.14717)
                  = A' x,  A'[:, i] = K/g² A[:, ⌊i/g⌋]
    PiSSA       y = (W0 - s B0 A0) x + s B A x                   B0, A0: singular vectors of W0 (arXiv:2404.02948)
                  = y0 + s [B, -B0] [A; A0] x
    OLoRA       the same                                         B0, A0: of W0's QR decomposition (arXiv:2406.01775)

W0 is the dequantized base; all is computed in float32, as PEFT does it when it loads the adapter over that base.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorry.adapters.errors import MalformedAdapter, UnsupportedField, WrongBase
from lorry.adapters.layout import MAX_RANK, Linear
from lorry.adapters.reading.base import BaseWeights
from lorry.adapters.reading.checkpoint import LinearTensors
from lorry.adapters.reading.replaced import own_matrix, token_rows
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.targets import EMBEDDING
from lorry.adapters.reading.update import Update


def update_of(linear: Linear, path: str, tensors: LinearTensors, spec: AdapterSpec, base: BaseWeights) -> Update:
    """The update of the module at `path`; raises MalformedAdapter for numbers that do not come out finite."""
    if tensors.weight is not None:
        return _finite(own_matrix(linear, path, tensors, base), path)
    if tensors.rows is not None:
        return token_rows(linear, tensors, base)
    update = Update(tensors.a, tensors.b, spec.scaling_of(path) if tensors.a is not None else 1.0)
    if tensors.a is not None and tensors.a.shape[1] != tensors.in_features:
        update = replace(update, a=_unpooled(tensors.a, tensors.in_features))
    if spec.init in _FACTORS and update.a is not None and linear != EMBEDDING:  # PEFT leaves that one alone
        update = _with_factors(update, path, base.weight(linear), spec)
    if tensors.magnitude is not None:
        update = _with_gain(update, tensors.magnitude, base.weight(linear))
    if tensors.bias is not None or update.gain is not None:
        before = base.bias(linear)
        if before is None and tensors.bias is not None:
            raise WrongBase(f"{path}.bias: this base has no bias there", f"{path}.bias")
        update = _with_bias(update, tensors.bias, before)
    if tensors.b_bias is not None:
        update = replace(update, shift=_sum(update.shift, update.scaling * tensors.b_bias.float()))
    return _finite(update, path)


def _finite(update: Update, path: str) -> Update:
    vectors = update.vectors
    if vectors is not None and not bool(vectors.isfinite().all()):
        raise MalformedAdapter(f"{path} has gains or biases that are not finite over this base", path)
    return update


def _unpooled(a: Tensor, in_features: int) -> Tensor:
    """A' [r, K] of QA-LoRA's A [r, K/g]."""
    pooled = a.shape[1]
    group = in_features // pooled
    return a.float().repeat_interleave(group, dim=1) * (pooled / group)


def _with_gain(update: Update, magnitude: Tensor, weight: Tensor) -> Update:
    assert update.a is not None and update.b is not None
    weight.addmm_(update.b.float(), update.a.float(), alpha=update.scaling)
    gain = magnitude.float() / torch.linalg.vector_norm(weight, dim=1)
    return replace(update, b=gain[:, None] * update.b.float(), gain=gain - 1)


def _with_bias(update: Update, bias: Tensor | None, before: Tensor | None) -> Update:
    """b' - c ⊙ b0 as the shift, from the adapter's bias and the base's."""
    if before is None:
        return update
    after = before if bias is None else bias.float()
    gained = before if update.gain is None else before + update.gain * before
    return replace(update, shift=_sum(update.shift, after - gained))


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second


def _with_factors(update: Update, path: str, weight: Tensor, spec: AdapterSpec) -> Update:
    """The pair [A; A0], [B, -B0] of twice the rank."""
    assert update.a is not None and update.b is not None
    rank = update.a.shape[0]
    if 2 * rank > MAX_RANK:
        raise UnsupportedField(
            f"init_lora_weights is {spec.init!r}, which takes twice the rank of {path}, {2 * rank}; at most {MAX_RANK}"
            " are served",
            "init_lora_weights",
        )
    a_0, b_0 = _FACTORS[spec.init](weight, rank, update.scaling)
    return replace(update, a=torch.cat([update.a.float(), a_0]), b=torch.cat([update.b.float(), -b_0], dim=1))


def _singular(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0, B0 of PiSSA: s B0 A0 is the best approximation of W0 of this rank."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _orthogonal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0, B0 of OLoRA: the first rows of R and columns of Q."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


_FACTORS = {"pissa": _singular, "olora": _orthogonal}
