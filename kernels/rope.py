"""Rotary position embedding, half-split convention ("rotate_half" of Hugging Face), in place.

    a, b = x[..., :D/2], x[..., D/2:];  c, s = cos_sin[position].split(D/2)
    x <- (a * c - b * s, b * c + a * s)

Source: RoFormer (arXiv:2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.kernels import dispatch, native


def rope_reference(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """The rotated copy of x [T, H, D]; positions int64 [T], cos_sin float32 [max_pos, D]."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotates q [T, Hq, D] and k [T, Hk, D] in place by their positions.

    positions: int64 [T], all below max_pos; cos_sin: float32 [max_pos, D], cosines in [:, :D/2], sines in
    [:, D/2:]. q and k may be strided views of one fused qkv output; only their last dimension must be contiguous.
    Raises IndexError for a position outside cos_sin; on a GPU its row becomes zeros.
    """
    if dispatch.on_gpu(q):
        from lorry.kernels.triton import kv_store as gpu

        gpu.rope(q, k, positions, cos_sin)
        return
    library = native.library()
    if library is not None and _fits(q) and _fits(k) and cos_sin.is_contiguous():
        rows, heads, width = q.shape
        q_strides, k_strides = q.stride(), k.stride()
        positions = positions.contiguous()
        status = library.rope(
            q.data_ptr(),
            q_strides[0],
            q_strides[1],
            heads,
            k.data_ptr(),
            k_strides[0],
            k_strides[1],
            k.shape[1],
            width,
            positions.data_ptr(),
            rows,
            cos_sin.data_ptr(),
            cos_sin.shape[0],
        )
        if status:
            raise IndexError(f"positions must lie in 0..{cos_sin.shape[0] - 1}")
        return
    q.copy_(rope_reference(q, positions, cos_sin))
    k.copy_(rope_reference(k, positions, cos_sin))


def _fits(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.stride()[2] == 1 and x.is_cpu
