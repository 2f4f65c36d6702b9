"""Lorry against vLLM on the CPU and transformers + PEFT: the same work in the same run, interleaved, medians.

    python bench/compare.py [--repeats 3] [--vllm-python P] [--hf-python P] [--retune]

Ours is measured over gRPC from another process, theirs in process without a network. Every peer serves the same
weights (the NF4 base dequantized to bfloat16) and the same adapters, each in the setting that is fastest here
(`peers/tuning.py`). Before any figure counts, the peers' and our greedy answers are compared.

Writes bench/results/serve-cpu.json; exits with 1 when a floor is not reached or the answers disagree.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from load import summarize
from peers.client import Peer, PeerFailed
from peers.environments import ENVIRONMENTS, Unavailable
from peers.tuning import tuned
from rich.console import Console
from rich.table import Table
from serve import measure
from server_process import lorry_server
from workload import Workload, adapter_name, bench_folder, export_base, write_adapters

from lorry.server.config import DEFAULT_MODEL

RESULT = Path(__file__).parent / "results" / "serve-cpu.json"
ADAPTERS, RANK = 8, 16
WORKLOADS = {
    "one_stream": Workload(streams=1, requests=2),
    "sixteen_base": Workload(streams=16, requests=16),
    "sixteen_lora8": Workload(streams=16, requests=16, adapters=ADAPTERS),
}
FLOORS = {"one_stream": 1.6, "sixteen_base": 1.15, "sixteen_lora8": 5.0}  # times vLLM
AIMS = {"one_stream": 3.0, "sixteen_base": 1.5, "sixteen_lora8": 7.0}
ADAPTERS_FLOOR, ADAPTERS_AIM = 0.70, 0.82  # sixteen_lora8 as a share of sixteen_base, both ours
AGREEMENT = 0.8  # share of answers whose first tokens must equal a peer's; the rest are near-ties of rounding
AGREEING_TOKENS = 4

console = Console()

Measure = Callable[[str, Workload], tuple[float, list[list[int]]]]  # tokens per second, answers


@dataclass
class System:
    """One of the compared: tokens per second of each run, by workload, and what it answered in the last one."""

    runs: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    absent: str = ""

    def median(self, key: str) -> float | None:
        return round(statistics.median(self.runs[key]), 2) if self.runs.get(key) else None


def work_of(workload: Workload, vocabulary: int) -> dict[str, Any]:
    """What a peer is sent."""
    names = [None if i is None else adapter_name(i) for i in workload.adapter_of()]
    return {
        "prompts": workload.prompts(vocabulary),
        "adapters": names,
        "streams": workload.streams,
        "new_tokens": workload.new_tokens,
    }


def start_peers(
    name: str, python: Path, common: dict[str, Any], vocabulary: int, root: Path, stack: ExitStack
) -> tuple[System, dict[str, Peer]]:
    """A worker for each workload in its best setting; workloads with equal settings share one."""
    system, workers, by_settings = System(), dict[str, Peer](), dict[str, Peer]()
    for mixed in (False, True):
        keys = [key for key, workload in WORKLOADS.items() if bool(workload.adapters) == mixed]
        names = [adapter_name(i) for i in range(ADAPTERS)] if mixed else []
        settings = {**common, "adapter_names": names}

        def start(candidate: dict[str, Any], settings: dict[str, Any] = settings) -> Peer:
            return Peer(name, python, {**settings, **candidate}, root / f"{name}.log")

        short = {key: replace(WORKLOADS[key], new_tokens=16) for key in keys}
        trial = {key: (work_of(w, vocabulary), work_of(w.again(1), vocabulary)) for key, w in short.items()}
        key = f"{cpu_name()} {psutil.cpu_count(logical=False)} {ENVIRONMENTS[name].packages}"
        best = tuned(name, key, start, trial, root / "tuned.json", lambda text: console.print(f"  [dim]{text}"))
        for work, candidate in best.items():
            same = json.dumps([mixed, candidate])
            if same not in by_settings:
                by_settings[same] = stack.enter_context(start(candidate))
            workers[work] = by_settings[same]
            system.settings[work] = candidate
            system.versions = by_settings[same].versions
    return system, workers


def agreement(ours: System, theirs: System) -> float | None:
    """Share of all answers that begin with the same tokens."""
    pairs = [
        (a[:AGREEING_TOKENS], b[:AGREEING_TOKENS])
        for key in WORKLOADS
        if key in theirs.answers
        for a, b in zip(ours.answers[key], theirs.answers[key], strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "instructions": [flag for flag in wanted if f" {flag} " in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def floors(systems: dict[str, System]) -> list[tuple[str, float | None, float, float]]:
    """What is demanded: (what, measured or None, floor, aim)."""
    ours, vllm = systems["lorry"], systems["vllm_cpu"]
    found = []
    for key in WORKLOADS:
        a, b = ours.median(key), vllm.median(key)
        found.append((f"{key}: lorry / vllm_cpu", a / b if a and b else None, FLOORS[key], AIMS[key]))
    lora, base = ours.median("sixteen_lora8"), ours.median("sixteen_base")
    share = lora / base if lora and base else None
    found.append(("lorry: sixteen_lora8 / sixteen_base", share, ADAPTERS_FLOOR, ADAPTERS_AIM))
    return found


def show(systems: dict[str, System], checks: list[tuple[str, float | None, float, float]]) -> None:
    table = Table(title="output tokens per second, medians; in brackets lorry's ratio")
    for column in ("", *systems):
        table.add_column(column, justify="right")
    for key in WORKLOADS:
        ours = systems["lorry"].median(key)
        cells = []
        for name, system in systems.items():
            speed = system.median(key)
            ratio = f" ({ours / speed:.2f}×)" if ours and speed and name != "lorry" else ""
            cells.append(f"{speed:.1f}{ratio}" if speed else "–")
        table.add_row(key, *cells)
    console.print(table)
    table = Table(title="floors")
    for column in ("", "measured", "floor", "aim"):
        table.add_column(column, justify="right")
    for what, value, floor, aim in checks:
        colour = "yellow" if value is None else "green" if value >= floor else "red"
        measured = "not measured" if value is None else f"{value:.2f}"
        table.add_row(what, f"[{colour}]{measured}", f"{floor:.2f}", f"{aim:.2f}")
    console.print(table)


def main(
    repeats: Annotated[int, typer.Option(min=3, help="Runs of each workload on each system.")] = 3,
    peers: Annotated[list[str] | None, typer.Option("--peer", help="Only these peers; unset: all.")] = None,
    vllm_python: Annotated[Path | None, typer.Option(help="Interpreter that has vLLM; unset: .venv-vllm.")] = None,
    hf_python: Annotated[Path | None, typer.Option(help="Interpreter that has PEFT; unset: .venv-hf.")] = None,
    retune: Annotated[bool, typer.Option(help="Try the peers' settings again.")] = False,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULT,
) -> None:
    """Measure, print ratios, check the floors, write the result."""
    root = bench_folder()
    base = export_base(DEFAULT_MODEL, root)
    folder = write_adapters(base, root, ADAPTERS, RANK)
    vocabulary = int(json.loads((base / "config.json").read_text())["vocab_size"])
    common = {
        "base": str(base),
        "adapters": str(folder),
        "rank": RANK,
        "context": 1024,
        "streams": max(workload.streams for workload in WORKLOADS.values()),
        "torch_threads": psutil.cpu_count(logical=False) or os.cpu_count(),
    }
    if retune:
        (root / "tuned.json").unlink(missing_ok=True)
    given = {"vllm_cpu": vllm_python, "hf_peft": hf_python}
    systems = {"lorry": System(versions={"lorry": version("lorry"), "torch": version("torch")})}
    with ExitStack() as stack:
        workers: dict[str, dict[str, Peer]] = {}
        for name, environment in ENVIRONMENTS.items():
            systems[name] = System(absent="left out by --peer" if peers and name not in peers else "")
            if systems[name].absent:
                continue
            try:
                console.print(f"{name}: environment and best setting")
                python = given[name] or environment.python()
                systems[name], workers[name] = start_peers(name, python, common, vocabulary, root, stack)
            except (Unavailable, PeerFailed) as error:
                systems[name].absent = str(error)
                console.print(f"[yellow]{name} is not measured: {error}")
        target = stack.enter_context(lorry_server(DEFAULT_MODEL, folder, root / "lorry.log"))

        def ours(key: str, workload: Workload) -> tuple[float, list[list[int]]]:
            times = measure(target, workload, f"lorry {key}")
            return summarize(times).output_tokens_per_second, [t.token_ids for t in times]

        def theirs(name: str, key: str, workload: Workload) -> tuple[float, list[list[int]]]:
            answer = workers[name][key].run(work_of(workload, vocabulary))
            return answer.tokens_per_second, answer.outputs

        measures: dict[str, Measure] = {
            "lorry": ours,
            **{name: partial(theirs, name) for name in workers},
        }
        for round_ in range(-1, repeats):  # the first one warms up
            for key, workload in WORKLOADS.items():
                for name in rotated(list(measures), round_):
                    speed, answers = measures[name](key, workload.again(round_ + 1))
                    console.print(f"[dim]{'warm-up' if round_ < 0 else round_ + 1} {key} {name}: {speed:.1f}")
                    systems[name].answers[key] = answers
                    if round_ >= 0:
                        systems[name].runs.setdefault(key, []).append(speed)
    checks = floors(systems)
    show(systems, checks)
    agreed = {name: agreement(systems["lorry"], systems[name]) for name in workers}
    for name, share in agreed.items():
        console.print(f"answers that begin as {name}'s: {share:.0%}, at least {AGREEMENT:.0%} wanted")
    write(output, systems, checks, agreed)
    below = [what for what, value, floor, _ in checks if value is not None and value < floor]
    wrong = [name for name, share in agreed.items() if share is None or share < AGREEMENT]
    if below or wrong:
        console.print(f"[red]below the floor: {', '.join(below) or '–'}; answers unlike: {', '.join(wrong) or '–'}")
        raise typer.Exit(1)


def rotated(names: list[str], by: int) -> list[str]:
    """Another system begins each round, so that none always runs on the machine that another one warmed."""
    by %= len(names)
    return names[by:] + names[:by]


def write(
    output: Path,
    systems: dict[str, System],
    checks: list[tuple[str, float | None, float, float]],
    agreed: dict[str, float | None],
) -> None:
    result: dict[str, Any] = {key: {name: s.median(key) for name, s in systems.items()} for key in WORKLOADS}
    result["ratios"] = {
        what: {"measured": None if value is None else round(value, 3), "floor": floor, "aim": aim}
        for what, value, floor, aim in checks
    }
    result["answers_that_begin_alike"] = agreed
    result["runs"] = {
        name: {k: [round(v, 2) for v in runs] for k, runs in s.runs.items()} for name, s in systems.items()
    }
    result["settings"] = {name: s.settings for name, s in systems.items() if s.settings}
    result["versions"] = {name: s.versions for name, s in systems.items()}
    result["absent"] = {name: s.absent for name, s in systems.items() if s.absent}
    result["machine"] = machine()
    result["unit"] = "output tokens per second, median of the runs"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
