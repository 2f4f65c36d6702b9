"""Each peer at its best: every setting that may be the fastest here is tried once, the best of each workload kept.

The choice is remembered in the benchmark's folder until machine, environment or workloads change (or `--retune`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.client import Peer, PeerFailed

BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")


def _dtypes() -> tuple[str, ...]:
    """bfloat16 products are emulated where the processor has no instruction for them: 2.5 times slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return ("float32", "bfloat16") if any(flag in flags for flag in BFLOAT16_FLAGS) else ("float32",)


CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "vllm_cpu": [
        {"dtype": dtype, "compile": compiled, "threads": "auto"} for dtype in _dtypes() for compiled in (False, True)
    ],
    "hf_peft": [{"dtype": dtype, "attention": "sdpa"} for dtype in _dtypes()],
}


def tuned(
    name: str,
    key: str,
    start: Callable[[dict[str, Any]], Peer],
    works: dict[str, tuple[dict[str, Any], dict[str, Any]]],
    memory: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The fastest candidate for each of `works`, which need workers of one kind (with or without adapters).

    Each work comes twice, with different prompts: one to warm up with, one to be timed.
    key: what the choice depends on beside the candidates; start: a worker with a candidate's settings
    Raises PeerFailed when no candidate runs.
    """
    known: dict[str, Any] = json.loads(memory.read_text()) if memory.exists() else {}
    place = f"{name} {key} {sorted(works)}"
    if place not in known:
        speeds: dict[str, list[tuple[float, dict[str, Any]]]] = {work: [] for work in works}
        failure = ""
        for candidate in CANDIDATES[name]:
            try:
                with start(candidate) as peer:
                    for work, (warming, timed) in works.items():
                        peer.run(warming)
                        speeds[work].append((peer.run(timed).tokens_per_second, candidate))
            except PeerFailed as error:
                failure = str(error)
                say(f"{name} {candidate}: does not run here")
                continue
            found = ", ".join(f"{work} {tried[-1][0]:.1f}" for work, tried in speeds.items())
            say(f"{name} {candidate}: {found} tokens/s")
        if any(not tried for tried in speeds.values()):
            raise PeerFailed(failure)
        known[place] = {work: max(tried, key=lambda pair: pair[0])[1] for work, tried in speeds.items()}
        memory.write_text(json.dumps(known, indent=1))
    choice: dict[str, dict[str, Any]] = known[place]
    return choice
