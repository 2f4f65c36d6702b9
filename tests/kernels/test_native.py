from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.kernels import native, nf4
from lorry.kernels.linear import DenseLinear, dense_linear
from lorry.kernels.nf4_linear import NF4Linear, nf4_linear, nf4_linear_reference
from lorry.kernels.silu_mul import silu_mul, silu_mul_reference


@pytest.fixture
def fresh_library() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_one_openmp_runtime_is_mapped_and_torch_governs_its_threads() -> None:
    library = native.library()
    maps = Path("/proc/self/maps")
    if library is None or not maps.exists():
        pytest.skip("needs the compiled kernels on Linux")
    runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps.read_text()))
    assert len(runtimes) == 1, runtimes
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            assert library.thread_count() == threads
    finally:
        torch.set_num_threads(before)


def test_build_is_reused_and_keyed_by_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("info.c", "common.h", "simd.h"):
        shutil.copy(native.SOURCES / name, sources)
    monkeypatch.setattr(native, "SOURCES", sources)
    first = native.build(("-O0",), tmp_path)
    stamp = first.stat().st_mtime_ns
    assert native.build(("-O0",), tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert native.build(("-O0", "-g0"), tmp_path) != first
    (sources / "info.c").write_text((sources / "info.c").read_text() + "\n")
    assert native.build(("-O0",), tmp_path) != first
    assert not list(tmp_path.glob(".building-*"))


def test_what_several_ask_for_at_once_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, built = native._compile, []

    def slowly(*arguments: Any) -> Path:
        built.append(arguments)
        time.sleep(0.2)
        return compile_(*arguments)

    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("info.c", "common.h", "simd.h"):
        shutil.copy(native.SOURCES / name, sources)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setattr(native, "_compile", slowly)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: native.build(("-O0",), tmp_path), range(3)))
    assert len(built) == 1 and len(set(paths)) == 1 and paths[0].exists()


@pytest.mark.usefixtures("fresh_library")
def test_without_a_compiler_the_references_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert native.library() is None
    weights = [nf4.quantize(torch.randn(n, 128)) for n in (48, 16)]
    x = torch.randn(5, 128)
    linear = NF4Linear(weights)
    assert torch.equal(nf4_linear(x, linear), nf4_linear_reference(x, weights))
    dense = torch.randn(33, 128)
    assert torch.equal(dense_linear(x, DenseLinear(dense)), x @ dense.T)
    assert torch.equal(silu_mul(x), silu_mul_reference(x))


@pytest.mark.usefixtures("fresh_library")
def test_a_compiler_that_fails_is_reported_with_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shell = shutil.which("sh")
    assert shell is not None
    fake = tmp_path / "cc"
    fake.write_text(f'#!{shell}\n[ "$1" = --version ] && exit 0\necho this machine is full >&2\nexit 3\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match=r"exited with 3: this machine is full"):
        assert native.library() is None
