"""Compiles the Triton kernels for GPUs that need not be there, as their launchers would start them.

    with compiling(90) as kernels: nf4_linear(...)     →     kernels: the Assembly of each launch, nothing was run

A launcher is called with tensors in host memory; instead of a launch, the kernel is compiled with the specialization
that Triton gives such arguments (a pointer or an integer that 16 divides, an integer that is 1), where it may.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90)
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Assembly:
    """One compiled kernel. opcodes: SASS instructions by name, with all of their suffixes; loop: those of the main
    loop; shared: bytes; spills: bytes of local memory of a thread; registers: of a thread."""

    name: str
    architecture: int
    opcodes: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    registers: int = 0
    spills: int = 0

    def count(self, prefix: str, where: str = "opcodes") -> int:
        """Instructions whose name begins with `prefix`, in all of the kernel or in its "loop"."""
        counts: dict[str, int] = getattr(self, where)
        return sum(number for name, number in counts.items() if name.startswith(prefix))


@contextmanager
def compiling(architecture: int) -> Iterator[list[Assembly]]:
    """Within, launches of Triton kernels compile for sm_`architecture` and add to the list."""
    done: list[Assembly] = []

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        done.append(_compile(self, args, options, architecture))

    with patch.object(JITFunction, "run", compile_instead):
        yield done


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], architecture: int) -> Assembly:
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in names if name in options}
    signature, constants, attributes = dict[str, str](), dict[str, Any](), dict[tuple[int], list[list[Any]]]()
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        specialized = not parameter.do_not_specialize
        fixed = parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized)
        signature[parameter.name] = "constexpr" if fixed else _type(value)
        if fixed:
            constants[parameter.name] = value
        elif specialized and type(value) is not float and _address(value) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return _read(kernel.__name__, architecture, made)


def _address(value: Any) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else int(value)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + DTYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read(name: str, architecture: int, made: Any) -> Assembly:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        sass = _run("nvdisasm", "-c", cubin.name)
        usage = _run("cuobjdump", "-res-usage", cubin.name)
    opcodes, loop = _opcodes(sass)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    return Assembly(name, architecture, opcodes, loop, made.metadata.shared, registers, stack)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _opcodes(sass: str) -> tuple[dict[str, int], dict[str, int]]:
    """Instructions by name, of all and of the longest loop, the longest way back of a branch, of those that multiply on
    the tensor cores where there are such."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = [(0, 0)]
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line):
            names.append(code[1])
            target = re.search(r"BRA(?:\.\w+)* .*?`?\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
    first, last = max(loops, key=lambda loop: (any("MMA" in name for name in names[slice(*loop)]), loop[1] - loop[0]))
    return dict(Counter(names)), dict(Counter(names[first:last]))


def main(output: str, name_of_module: str) -> None:
    """Compile the CASES (name → function that launches) of the module for all ARCHITECTURES; write JSON.

    Its ONLY_FOR says which cases are for which architectures alone.
    """
    import importlib

    sys.path.insert(0, str(Path(__file__).parent))
    module = importlib.import_module(name_of_module)
    cases: dict[str, Callable[[], object]] = module.CASES
    only_for: dict[str, tuple[int, ...]] = getattr(module, "ONLY_FOR", {})
    results: dict[str, list[dict[str, Any]]] = {}
    for name, launch in cases.items():
        for architecture in only_for.get(name, ARCHITECTURES):
            with compiling(architecture) as kernels:
                launch()
            results.setdefault(f"{name}@{architecture}", []).extend(asdict(kernel) for kernel in kernels)
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
