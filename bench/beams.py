"""What searches cost beside plain sampling of as many sequences, on the default model and a CPU, checked first.

    python bench/beams.py [--new-tokens 64] [--repeats 9] [--profile] [--output bench/results/beams-cpu.json]

Each search and the plain sequences beside it take turns, alone on the engine: a run of one is followed by a run of the
other, and the ratio is that of the medians of the runs' times for each step that decodes, by the clock and by the
process's CPU time. A search whose answers are wrong has no figure: the score that it gives must be the sum of the
log-probabilities that scoring its text gives. Exits with 1 where that fails or the floor is missed: width 4 within 1.3
times the time of 4 plain sequences.
"""

from __future__ import annotations

import cProfile
import json
import math
import os
import pstats
import statistics
import time
from pathlib import Path
from typing import Annotated

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in the engine's process; before torch is imported

import torch
import typer
from rich.console import Console
from rich.table import Table

from lorry.server.config import EngineConfig
from lorry.server.engine.build import Types
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import Generate, SamplingParams, StoppingParams
from lorry.server.model.load import load_model
from lorry.server.model.store import DEFAULT_MODEL, resolve_model
from lorry.server.params import BeamSearch, ContrastiveSearch, Search

FLOOR = 1.3
PROMPT = list(range(100, 164))
CASES: dict[str, Search] = {
    "beam, width 4": BeamSearch(4, 0.0),
    "beam, width 8": BeamSearch(8, 0.0),
    "beam, width 4 in 2 groups": BeamSearch(4, 0.0, groups=2, diversity_penalty=0.5),
    "contrastive, top-k 4": ContrastiveSearch(4, 0.6),
}
GATED = "beam, width 4"


def request(name: str, search: Search | None, width: int, new: int) -> Generate:
    n = width if search is None else 1
    stopping = StoppingParams(new, ignore_eos=True)
    return Generate(name, PROMPT, SamplingParams(seed=1, n=n, search=search), stopping)


def check(engine: LocalEngine, search: Search) -> None:
    """Raises ValueError for an answer whose score is not that of its text."""
    if not isinstance(search, BeamSearch) or search.diversity_penalty:
        return
    completion = engine.generate(request("check", search, search.width, 12))[0].completions[0]
    text = PROMPT + completion.token_ids
    scoring = Generate("score", text, SamplingParams(), StoppingParams(0), prompt_logprobs_from=len(PROMPT), logprobs=0)
    scored = engine.generate(scoring)[0].prompt_logprobs or []
    total = sum(each.logprob for each in scored)
    if completion.score is None or not math.isclose(total, completion.score, rel_tol=2e-2):
        raise ValueError(f"the answer's score is {completion.score}, its text's {total}")


def seconds_a_step(engine: LocalEngine, wanted: Generate) -> tuple[float, float]:
    """By the clock and by CPU time, of the steps that decode."""
    engine.send(wanted)
    engine.step()  # the prompt
    steps, clock, cpu = 0, time.perf_counter(), time.process_time()
    while engine.engine.scheduler.requests:
        engine.step()
        steps += 1
    return (time.perf_counter() - clock) / steps, (time.process_time() - cpu) / steps


def main(
    model: Annotated[str, typer.Option(help="Name or folder.")] = DEFAULT_MODEL,
    new_tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each; the medians are compared.")] = 9,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the gated search spends its time.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
) -> None:
    """Measure all cases."""
    config = EngineConfig(device="cpu")
    types = Types.choose(config)
    engine = LocalEngine(load_model(str(resolve_model(model)), products=types.products), config, types)
    table = Table(
        "search", "ms a step", "plain, ms", "ratio", "ratio, CPU time", title=f"{torch.get_num_threads()} threads"
    )
    rows, failed = [], False
    for name, search in CASES.items():
        width = search.rows[1]
        try:
            check(engine, search)
        except ValueError as error:
            Console().print(f"{name}: {error}")
            failed = True
            continue
        found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for number in range(repeats + 1):
            for kind, wish in enumerate((search, None)):
                measured = seconds_a_step(engine, request(f"{kind}-{number}", wish, width, new_tokens))
                if number:  # the first is a warm-up
                    found[kind].append(measured)
        clock, cpu = [[statistics.median(each[i] for each in kind) for kind in found] for i in (0, 1)]
        row = {"case": name, "ms": clock[0] * 1e3, "plain_ms": clock[1] * 1e3}
        row |= {"ratio": clock[0] / clock[1], "cpu_ratio": cpu[0] / cpu[1]}
        rows.append(row)
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("ms", "plain_ms", "ratio", "cpu_ratio")))
        failed |= name == GATED and clock[0] / clock[1] > FLOOR
    Console().print(table)
    if profile:
        profiler = cProfile.Profile(time.process_time)
        profiler.runcall(seconds_a_step, engine, request("profiled", CASES[GATED], 4, new_tokens))
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(40)
    if output is not None:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "model": Path(model).name}
        output.write_text(json.dumps({"machine": machine, "new_tokens": new_tokens, "rows": rows}, indent=2) + "\n")
    engine.close()
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
