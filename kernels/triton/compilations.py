"""What Triton compiles and when: all of it at start, several at a time, and nothing while serving.

with noted() as wanted: launch …      notes what is not compiled yet instead of launching it
compile_noted(wanted, threads, …)     compiles it; Triton keeps it in its folder, where the next start finds it
report_late(…)                        from now on, says what is compiled all the same
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.runtime.jit import JITFunction


def keep_in(folder: Path) -> None:
    """Have Triton keep its compilations in `folder`, unless $TRITON_CACHE_DIR says where."""
    if "TRITON_CACHE_DIR" not in os.environ:
        triton.knobs.cache.dir = str(folder)


@dataclass(frozen=True)
class Compilation:
    """One kernel in one specialization: of types, of constants, of integers that are 1 or that 16 divides."""

    kernel: str
    key: str
    function: Any
    data: str

    def compile(self) -> None:
        self.function.preload(self.data)


@contextmanager
def noted() -> Iterator[dict[tuple[str, str], Compilation]]:
    """Within, no kernel is launched, and those that are not compiled yet are noted, by kernel and key.

    So what they should have written stays as it was: nothing within may use it as an index.
    """
    wanted: dict[tuple[str, str], Compilation] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        wanted[fn.name, key] = Compilation(fn.name, key, fn.jit_function, compile["specialization_data"])
        return True

    def launch_nothing(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    before, launch = triton.knobs.runtime.jit_cache_hook, JITFunction.run
    triton.knobs.runtime.jit_cache_hook, JITFunction.run = note, launch_nothing
    try:
        yield wanted
    finally:
        triton.knobs.runtime.jit_cache_hook, JITFunction.run = before, launch


def compile_noted(
    wanted: dict[tuple[str, str], Compilation], threads: int, progress: Callable[[int, int], None]
) -> None:
    """Compile, `threads` at a time; progress(done, of how many)."""
    progress(0, len(wanted))
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(compilation.compile) for compilation in wanted.values()]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                progress(done, len(wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def report_late(report: Callable[[str], None]) -> None:
    """From now on call `report` with the name of each kernel that is compiled, or read from Triton's folder."""

    def late(*, fn: Any, **_: object) -> None:
        report(fn.name)

    triton.knobs.runtime.jit_post_compile_hook = late
