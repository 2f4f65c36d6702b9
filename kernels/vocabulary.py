"""Reductions along the vocabulary on the CPU, each row in one thread, without a copy of the logits.

    w[t] = exp((z[t] - max z) / T)      M = Σ w      draw: the first t with  Σ w over ids up to t  >  u M

A row's results do not depend on the other rows. Sums are float32 over 128 elements, float64 beyond. Where the kernels
could not be compiled `serves` says no, and `lorry.server.decoding.rowwise` does it with numpy.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorry.kernels import native


def serves(logits: Tensor) -> bool:
    """Whether the functions below take these logits: float32 [R, V] in host memory, dense, with the kernels there."""
    dense = logits.device.type == "cpu" and logits.dtype is torch.float32 and logits.is_contiguous()
    return dense and native.library() is not None


def draw(logits: Tensor, temperatures: NDArray[np.float32], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """logits: float32 [R, V]; temperatures: float32 [R], > 0; uniforms: float64 [R] in [0, 1). Returns int64 [R]."""
    temperatures, uniforms = _dense(temperatures, np.float32), _dense(uniforms, np.float64)
    tokens = np.empty(len(logits), np.int64)
    pointers = temperatures.ctypes.data, uniforms.ctypes.data, tokens.ctypes.data
    native.check(_library().vocabulary_draw(logits.data_ptr(), *logits.shape, *pointers))
    return tokens


def totals(logits: Tensor, temperatures: NDArray[np.float32]) -> NDArray[np.float64]:
    """M, float64 [R]. logits: float32 [R, V]; temperatures: float32 [R], > 0."""
    temperatures = _dense(temperatures, np.float32)
    masses = np.empty(len(logits))
    pointers = temperatures.ctypes.data, masses.ctypes.data
    native.check(_library().vocabulary_totals(logits.data_ptr(), *logits.shape, *pointers))
    return masses


def nth_equal(logits: Tensor, values: NDArray[np.float32], nth: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index of the `nth[r]`-th element of row r, from 0, that equals `values[r]`, or 0; int64 [R]."""
    values, nth = _dense(values, np.float32), _dense(nth, np.int64)
    places = np.empty(len(logits), np.int64)
    pointers = values.ctypes.data, nth.ctypes.data, places.ctypes.data
    native.check(_library().vocabulary_nth(logits.data_ptr(), *logits.shape, *pointers))
    return places


def top_values(logits: Tensor, count: int) -> NDArray[np.float32]:
    """The min(count, V) largest values of each row, falling; float32 [R, min(count, V)]."""
    count = min(count, logits.shape[1])
    found = np.empty((len(logits), count), np.float32)
    native.check(_library().vocabulary_top(logits.data_ptr(), *logits.shape, count, found.ctypes.data))
    return found


def _dense(numbers: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    return np.ascontiguousarray(numbers, dtype)


def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None, "ask `serves` first"
    return library
