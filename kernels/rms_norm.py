"""Root-mean-square norm over the last dimension, optionally fused with the residual addition before it.

    residual <- residual + x                      (only where a residual is given)
    y = x / sqrt(mean(x**2) + eps) * weight       x here is the updated residual where one is given

Computed in float32; the normalized value is rounded to x's dtype before the weight multiplies it, as in the
Hugging Face Llama family.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from lorry.kernels import dispatch, native
from lorry.kernels.lora import LoraTerm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x**2) + eps) * weight; x [..., D], weight [D] -> [..., D] in x's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None, lora: LoraTerm | None = None) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, lora: LoraTerm | None = None
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, lora: LoraTerm | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x**2) + eps) * weight over the last dimension.

    x: [..., D], any strides over the leading dimensions (a head of a fused qkv output may be handed as a view);
    weight: [D]; residual: same shape as x, updated in place to residual + x, and then normed in x's stead.
    lora: on a GPU, the LoRA sum of the product that made x [M, D], its shrink done, still to be added; x itself stays.
    Returns y, contiguous in x's dtype; with a residual the pair (y, residual). float32 on a CPU takes the native
    kernel where x has at most three dimensions, or any number of contiguous ones.
    """
    if dispatch.on_gpu(x):
        from lorry.kernels.triton import rms_norm as gpu

        normed = gpu.rms_norm(x, weight, eps, residual, lora)
        return normed if residual is None else (normed, residual)
    assert lora is None, "only a GPU kernel finishes a LoRA sum"
    library = native.library()
    if library is None or not _fits(x, weight, residual):
        if residual is None:
            return rms_norm_reference(x, weight, eps)
        residual += x
        return rms_norm_reference(residual, weight, eps), residual
    strides = x.stride()
    if len(strides) == 2:
        outer, width = x.shape
        inner, outer_stride, inner_stride = 1, strides[0], 0
        y = torch.empty(outer, width)  # a torch.Size instead of numbers would take 1.5 us more
    elif len(strides) == 3:
        outer, inner, width = x.shape
        outer_stride, inner_stride, _ = strides
        y = torch.empty(outer, inner, width)
    else:
        y = torch.empty(x.shape)
        width = x.shape[-1]
        outer, inner, outer_stride, inner_stride = y.numel() // width, 1, width, 0
    library.rms_norm(
        x.data_ptr(),
        outer,
        inner,
        outer_stride,
        inner_stride,
        width,
        weight.data_ptr(),
        eps,
        None if residual is None else residual.data_ptr(),
        y.data_ptr(),
    )
    return y if residual is None else (y, residual)


def _fits(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and x.stride()[-1] == 1
        and (x.dim() in (2, 3) or x.is_contiguous())
        and (residual is None or (residual.dtype is torch.float32 and residual.is_contiguous()))
    )
