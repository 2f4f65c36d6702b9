"""Compiles, caches and binds the CPU kernels of csrc/ at first use.

The C compiler of the machine builds for the machine's own processor; the result lies in the user's cache directory
under a digest of sources, flags, compiler and processor, written aside and renamed when whole, by one process
however many ask for it. Torch is imported first, so its OpenMP runtime is the one that the library binds to, and
`torch.set_num_threads` governs both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the order and number of roundings are written in the sources
    "-fno-math-errno",
    "-Wno-psabi",
)
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum elem of simd.h
CACHE_TYPES = {**ELEMENT_TYPES, torch.float8_e4m3fn: 3}
PAGE_TYPES = {**CACHE_TYPES, torch.int8: 4}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[type]] = {
    "simd_name": [],
    "thread_count": [],
    "nf4_quantize": [_POINTER, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER],
    "linear_forward": [_POINTER, _POINTER, _INT, _INT, _POINTER, _INT],
    "linear_rows": [_POINTER, _POINTER, _INT, _POINTER],
    "rms_norm": [_POINTER, *[_INT] * 5, _POINTER, _FLOAT, _POINTER, _POINTER],
    "rope": [_POINTER, *[_INT] * 3, _POINTER, *[_INT] * 4, _POINTER, _INT, _POINTER, _INT],
    "silu_mul": [_POINTER, *[_INT] * 3, _POINTER],
    "kv_store": [
        *(_POINTER, _INT, _INT, _POINTER, _INT, _INT),
        *(_POINTER, _POINTER, *[_INT] * 5, _POINTER, _INT),
    ],
    "paged_attention": [
        *(_POINTER, *[_INT] * 5, _POINTER, _POINTER, _INT),
        *(_POINTER, _INT, _POINTER, _POINTER, _INT, _FLOAT, _INT, _POINTER),
    ],
    "layers_forward": [_POINTER] * 4,
    "lora_add": [
        *(_POINTER, _INT, _POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT),
        *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT),
    ],
    "lora_embed": [
        *(_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT),
        *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT, _INT),
    ],
    "copy_pieces": [_POINTER] * 4 + [_INT],
    "penalize": [_POINTER, _INT, _INT, *[_POINTER] * 10],
    "philox_uniforms": [*[_POINTER] * 3, _INT, _INT, _POINTER],
    "vocabulary_draw": [_POINTER, _INT, _INT, *[_POINTER] * 3],
    "vocabulary_totals": [_POINTER, _INT, _INT, *[_POINTER] * 2],
    "vocabulary_nth": [_POINTER, _INT, _INT, *[_POINTER] * 3],
    "vocabulary_top": [_POINTER, _INT, _INT, _INT, _POINTER],
    "truncated_draw": [_POINTER, _INT, _INT, *[_POINTER] * 3],
}


class Part(ctypes.Structure):
    """struct part of csrc/linear.h."""

    _fields_ = (
        ("words", _POINTER),
        ("absmax_codes", _POINTER),
        ("absmax", _POINTER),
        ("nested_absmax", _POINTER),
        ("nested_code", _POINTER),
        ("nested_offset", _FLOAT),
        ("nested_shift", ctypes.c_int32),
        ("tiles", _INT),
    )


class Linear(ctypes.Structure):
    """struct linear of csrc/linear.h."""

    _fields_ = (
        ("parts", _POINTER),
        ("part_count", _INT),
        ("in_features", _INT),
        ("out_features", _INT),
        ("tiles", _INT),
        ("bias", _POINTER),
        ("code", _POINTER),
        ("code_int16", _POINTER),
        ("unit", _FLOAT),
        ("kind", _INT),
    )


class NativeError(RuntimeError):
    """The kernels could not be compiled or loaded; says why."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels with their argument types set, or None where the torch references serve.

    Compiles on first use (some seconds) where the cache holds no build; a failure is reported once as a warning.
    """
    try:
        return load(build())
    except NativeError as error:
        warnings.warn(
            f"Lorry's CPU kernels are not available, the slower torch path serves: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build(extra_flags: tuple[str, ...] = (), folder: Path | None = None) -> Path:
    """Path of the shared library for this processor, compiled if `folder` (the user's cache) has none yet.

    extra_flags come after FLAGS, so that they can narrow the instruction set. Raises NativeError.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeError(f"no C compiler found (looked for {', '.join(COMPILERS)})")
    flags = FLAGS + extra_flags
    digest = hashlib.sha256()
    for item in (*flags, _run([compiler, "--version"]), _processor()):
        digest.update(item.encode() + b"\0")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = folder or cache_folder()
    target = folder / f"{digest.hexdigest()[:32]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(folder / f"{target.stem}.lock"),
            tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as aside,
        ):
            if target.exists():  # another process has built it
                return target
            whole = _compile(compiler, flags, [path for path in sources if path.suffix == ".c"], Path(aside))
            whole.replace(target)
    except OSError as error:
        raise NativeError(f"cannot write to {folder}: {error}") from error
    return target


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], folder: Path) -> Path:
    """Compiles the sources side by side and links them to one library in `folder`."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [compiler, *flags, "-c", "-o", str(target), str(source)]
            for target, source in zip(objects, sources, strict=True)
        ]
        list(pool.map(_run, commands))
    whole = folder / "whole.so"
    _run([compiler, *flags, "-shared", "-o", str(whole), *map(str, objects), "-lm"])
    return whole


def load(path: Path) -> ctypes.CDLL:
    """The library at `path` with argument and result types set. Raises NativeError."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"cannot load {path}: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = ctypes.c_char_p if name == "simd_name" else ctypes.c_int
    return loaded


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lorry/native`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lorry" / "native"


def check(status: int) -> None:
    """Raises MemoryError for the -1 that a kernel returns when its scratch memory cannot be had."""
    if status:
        raise MemoryError("a CPU kernel could not allocate its scratch memory")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise NativeError(f"{command[0]} exited with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: the flags line of the first processor where the system shows one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in wanted))
