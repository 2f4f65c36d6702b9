"""Which kernels serve a tensor: those in `triton/` on a GPU, those in `csrc/` and the references on a CPU."""

from __future__ import annotations

from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels serve `x`. Tests replace this to run a whole decoder in Triton's interpreter."""
    return x.is_cuda
