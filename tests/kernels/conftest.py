"""What the kernel tests share: the builds under test, the error measure and paged batches."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorry.kernels import native

BUILDS = {"native": (), "avx2": ("-mno-avx512f",), "plain": ("-mno-avx512f", "-mno-avx2", "-mno-avx")}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(scope="session", params=BUILDS)
def build(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The library compiled for each set of lanes that this machine can run."""
    name: str = request.param
    if name != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("narrower builds exist on x86 only")
    library = native.load(native.build(BUILDS[name]))
    if name != "native" and library.simd_name().decode() != name:
        pytest.skip(f"this machine's widest lanes are {library.simd_name().decode()}")
    return library


@pytest.fixture
def kernels(build: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Makes one build serve every launcher for the length of a test."""
    monkeypatch.setattr(native, "library", lambda: build)
    return build


@pytest.fixture
def relative_rms() -> Callable[[Tensor, Tensor], float]:
    """sqrt(mean((actual - expected)**2) / mean(expected**2)); NaN where actual holds one."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        difference = actual.double() - expected.double()
        return float((difference.square().mean() / expected.double().square().mean()).sqrt())

    return measure


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `torch.empty` is full of NaN, so that an output a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
