"""Times all that lies between the logits of a step and its tokens, for every strategy, beside a step of the same model.

    python bench/decoding.py [--output bench/results/decoding-cpu.json] [--quick]

One figure for each strategy, batch and vocabulary: the median of calls of `Sampling.decide`, which take turns, so that
a disturbance meets all of them. The logits are the model's own at places of a text, from its decode steps at that
batch; those of the larger vocabulary are they again, and twice more, less likely. Every row holds a text of 300 tokens.
A step is the engine's, greedy, all streams decoding; what its own choice of tokens takes is taken off, and each
strategy's time is given as a share of the rest and itself.

No figure counts before its tokens are those of each row alone. Exits with 1 where they are not, or where a floor is
missed: plain sampling with all cuts and penalties at batch 16 within 8 % of the step.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in the engine's process; before torch is imported

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from lorry.server.config import EngineConfig
from lorry.server.decoding.interface import Row
from lorry.server.decoding.sampling import Sampling
from lorry.server.engine.build import Types
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import Generate
from lorry.server.model.load import load_model
from lorry.server.model.store import DEFAULT_MODEL, resolve_model
from lorry.server.params import Dry, Mirostat, SamplingParams, StoppingParams

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = REPOSITORY / "tests" / "model" / "prose.txt"
BATCHES = (1, 16, 64)
LARGE_VOCABULARY = 128_256
PROMPT, HISTORY, WARM_UP = 96, 300, 3
FLOORS = {("all cuts and penalties", 16): 0.08}

CUTS: dict[str, Any] = {
    "top_n_sigma": 2.0,
    "top_k": 100,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.95,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 6e-4,
}
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "dry": Dry(0.8, sequence_breakers=(198,)),
}
BANS: dict[str, Any] = {"no_repeat_ngram_size": 4, "bad_words": ((42,), (77, 78), (5, 6, 7))}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain sampling": {},
    "temperature": {"temperature": 0.8},
    **{name: {name: value} for name, value in CUTS.items()},
    "mirostat": {"mirostat": Mirostat()},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence and frequency": {"presence_penalty": 0.2, "frequency_penalty": 0.1},
    "dry": {"dry": PENALTIES["dry"]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 4},
    "bad_words": {"bad_words": BANS["bad_words"]},
    "allowed_token_ids": {"allowed_token_ids": tuple(range(0, 2000, 2))},
    "logit_bias": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "all cuts": {**CUTS, "temperature": 0.8},
    "all penalties": PENALTIES,
    "all cuts and penalties": {**CUTS, **PENALTIES, "temperature": 0.8},
    "everything": {**CUTS, **PENALTIES, **BANS, "temperature": 0.8, "logit_bias": {3: 1.0}},
}


class Watched(Sampling):
    """Remembers the last logits and how long each choice took."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.empty(0)
        self.seconds = 0.0

    def decide(self, rows: Any, logits: Tensor, hidden_states: Tensor | None = None) -> Any:
        self.logits = logits.clone()
        start = time.perf_counter()
        found = super().decide(rows, logits, hidden_states)
        self.seconds = time.perf_counter() - start
        return found


def decode_step(engine: LocalEngine, ids: list[int], batch: int, steps: int) -> tuple[float, Tensor]:
    """Seconds of a step less its choice of tokens, median; the logits of the last one."""
    watched = Watched()
    engine.engine.committer.strategy = watched
    texts = [(ids * 3)[start : start + PROMPT] for start in range(0, 7 * batch, 7)]
    stopping = StoppingParams(steps + 2 * WARM_UP + batch, ignore_eos=True)  # while others prefill, the first decode
    requests = [Generate(f"r{i}", text, SamplingParams(temperature=0.0), stopping) for i, text in enumerate(texts)]
    engine.send(*requests)
    while len(watched.logits) < batch:
        engine.step()
    taken = []
    for _ in range(WARM_UP + steps):
        watched.logits = watched.logits[:0]
        start = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - start - watched.seconds)
        assert len(watched.logits) == batch, "the streams do not all decode"
    logits = watched.logits
    engine.run()
    return statistics.median(taken[WARM_UP:]), logits


def enlarged(logits: Tensor) -> Tensor:
    """The same for a larger vocabulary."""
    return torch.cat((logits, logits - 6.0, logits - 8.0), dim=1)[:, :LARGE_VOCABULARY].contiguous()


def rows_of(options: dict[str, Any], ids: list[int], batch: int) -> list[Row]:
    rows = []
    for number in range(batch):
        text = (ids * 3)[11 * number : 11 * number + HISTORY]
        sampling = SamplingParams(seed=number, **options)
        rows.append(
            Row(number, number, 0, text[:PROMPT], text[PROMPT:], sampling, StoppingParams(999), eos_token_ids=(2,))
        )
    return rows


def expect_solo_tokens(name: str, rows: list[Row], logits: Tensor) -> None:
    """The gate: a row's token is that of its solo run."""
    strategy = Sampling()
    together = [found.token_ids for found in strategy.decide(rows, logits.clone())]
    alone = [Sampling().decide([row], logits[at : at + 1].clone())[0].token_ids for at, row in enumerate(rows)]
    if together != alone:
        raise SystemExit(f"correctness gate: {name} chooses other tokens in a batch than alone; no figures")


def measure(logits: Tensor, ids: list[int], rounds: int) -> dict[str, float]:
    """Median seconds of each strategy, which take turns."""
    batches = {name: rows_of(options, ids, len(logits)) for name, options in STRATEGIES.items()}
    for name, rows in batches.items():
        expect_solo_tokens(name, rows, logits)
    strategies = {name: Sampling() for name in STRATEGIES}
    taken: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for _ in range(rounds + 1):
        for name, strategy in strategies.items():
            own = logits.clone()
            start = time.perf_counter()
            strategy.decide(batches[name], own)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def markdown(figures: list[dict[str, Any]]) -> str:
    """The table of docs/performance.md."""
    columns = list(dict.fromkeys((row["vocabulary"], row["rows"]) for row in figures))
    heads = "".join(f" {rows} × {vocabulary // 1000}k |" for vocabulary, rows in columns)
    lines = [f"| ms a step (share of it) |{heads}", "|---|" + "---|" * len(columns)]
    for name in STRATEGIES:
        cells = []
        for vocabulary, rows in columns:
            row = next(r for r in figures if (r["strategy"], r["vocabulary"], r["rows"]) == (name, vocabulary, rows))
            share = "" if row["share"] is None else f" ({100 * row['share']:.1f} %)"
            cells.append(f" {row['ms']:.2f}{share} |")
        lines.append(f"| {name} |" + "".join(cells))
    return "\n".join(lines)


def main(
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("bench/results/decoding-cpu.json"),
    quick: Annotated[bool, typer.Option(help="Few rounds, batch 1 and 16, the model's vocabulary.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; torch's own number by default.")] = None,
    model: Annotated[str, typer.Option(help="As of lorry serve.")] = DEFAULT_MODEL,
) -> None:
    """Check, time, compare with the step, write."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    folder = resolve_model(model)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids
    config = EngineConfig(max_running=max(BATCHES))
    types = Types.choose(config)
    decoder = load_model(str(folder), dtype=types.dtype, products=types.products)
    engine = LocalEngine(decoder, config, types)
    figures: list[dict[str, Any]] = []
    steps: dict[int, float] = {}
    for batch in BATCHES[:2] if quick else BATCHES:
        steps[batch], own = decode_step(engine, ids, batch, 8 if quick else 30)
        for logits in (own,) if quick else (own, enlarged(own)):
            found = measure(logits, ids, 5 if quick else 25)
            for name, seconds in found.items():
                share = seconds / (steps[batch] + seconds) if logits is own else None
                figures.append(
                    {
                        "strategy": name,
                        "vocabulary": logits.shape[1],
                        "rows": batch,
                        "ms": seconds * 1e3,
                        "share": share,
                    }
                )
    engine.close()
    floors = []
    for (name, batch), most in FLOORS.items():
        (share,) = [
            r["share"] for r in figures if (r["strategy"], r["rows"]) == (name, batch) and r["share"] is not None
        ]
        floors.append({"strategy": name, "rows": batch, "most": most, "share": share, "reached": share <= most})
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": model,
        "step_ms_without_decoding": {str(batch): seconds * 1e3 for batch, seconds in steps.items()},
        "floors": floors,
        "figures": figures,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    show(console, result)
    print(markdown(figures))
    if not all(floor["reached"] for floor in floors):
        raise typer.Exit(1)


def show(console: Console, result: dict[str, Any]) -> None:
    table = Table("strategy", "rows", "most of a step", "measured")
    for floor in result["floors"]:
        color = "green" if floor["reached"] else "red"
        table.add_row(
            floor["strategy"], str(floor["rows"]), f"{floor['most']:.0%}", f"[{color}]{floor['share']:.1%}[/]"
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
