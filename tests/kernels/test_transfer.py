"""Arrays packed for one copy come out as they went in, each aligned."""

from __future__ import annotations

import numpy as np
import torch

from lorry.kernels.transfer import ALIGNMENT, Readback, to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_arrays_of_all_types_and_lengths() -> None:
    arrays = [
        np.array([2**63 - 1, -5, 3]),
        np.array([0.1], np.float64),
        np.empty(0, np.int32),
        np.array([True, False, True]),
        np.array([-np.inf, 1.5, 2.5, 3.5, 4.5], np.float32),
        np.arange(6, dtype=np.int32).reshape(2, 3),
    ]
    tensors = to_device(arrays, DEVICE)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.device.type == DEVICE.type
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert np.array_equal(tensor.cpu().numpy(), array)
    again = Readback(*tensors).wait()
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(arrays, again, strict=True))
