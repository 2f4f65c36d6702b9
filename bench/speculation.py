"""Tokens a second with and without tokens proposed ahead, in one process, on texts to edit and on questions.

    python bench/speculation.py [--model M] [--draft-model D] [--quick] [--output bench/results/speculation-cpu.json]

A case is a workload (`editing.py`), a number of streams, a proposer, adapters or none, and a temperature. Its prompts
run in groups of so many streams to their own ends; each group runs with and without proposals, one right after the
other, and which comes first changes from round to round. A ratio is of the times of one round, in which the machine's
other tenants disturb both alike; the figure is the median of the rounds. A round that is not timed comes before, so
that prompts are in the cache of prefixes: what is timed is decoding, and a draft model's reading of the prompt. Tokens
proposed and accepted are those of all timed rounds.

Every answer is compared with that of the same seed without proposals, token by token. Exits with 1 where one differs,
or where a floor is missed: for one greedy stream by prompt lookup 1.5 times as fast on texts to edit, and at most 5 %
slower on questions, where it finds little.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in the engine's process; before torch is imported

import msgspec
import numpy as np
import torch
import typer
from editing import TASKS, Prompt, edits, questions
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from serve import machine

from lorry.server.config import EngineConfig
from lorry.server.engine.build import Types
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import AdapterRef, Generate, SamplingParams, Stats, StoppingParams
from lorry.server.engine.report import INTERVAL
from lorry.server.frontend.request import ChatMessage, ChatPrompt
from lorry.server.frontend.tokenizer import Tokenizer, from_folder
from lorry.server.model.load import load_model
from lorry.server.model.store import DEFAULT_MODEL, resolve_model
from lorry.server.params import Proposer, Speculation

ADAPTERS = Path(__file__).resolve().parents[1] / "examples" / "adapters"
WORKLOADS = {"edit": edits, "chat": questions}
FLOORS = {"edit": 1.5, "chat": 0.95}
PATIENCE = 600.0  # seconds of a group


@dataclass(frozen=True)
class Case:
    """adapters: the examples', in turn, or none; temperature: 0 is greedy."""

    workload: str
    streams: int
    proposer: Proposer = "prompt_lookup"
    adapters: bool = False
    temperature: float = 0.0

    @property
    def floor(self) -> float | None:
        """The least ratio."""
        plain = self.streams == 1 and not self.adapters and self.temperature == 0
        return FLOORS[self.workload] if plain and self.proposer == "prompt_lookup" else None


def cases(streams: list[int], draft_model: bool) -> Iterator[Case]:
    proposers: list[Proposer] = ["prompt_lookup", "draft_model"] if draft_model else ["prompt_lookup"]
    for proposer, count, workload in itertools.product(proposers, streams, WORKLOADS):
        yield Case(workload, count, proposer)
        yield Case(workload, count, proposer, adapters=True)
    for proposer in proposers:
        yield Case("edit", streams[0], proposer, temperature=0.7)


class Bench:
    """Cases over one loaded model."""

    def __init__(self, model: str, draft_model: str | None, new_tokens: int, draft_tokens: int) -> None:
        self.config = EngineConfig(model=model, device="cpu", adapters_dir=str(ADAPTERS), draft_model=draft_model)
        self.types = types = Types.choose(self.config)
        self.decoder = load_model(str(resolve_model(model)), dtype=types.dtype, products=types.products)
        self.draft = None
        if draft_model is not None:
            self.draft = load_model(str(resolve_model(draft_model)), dtype=types.dtype, products=types.products)
        self.tokenizer: Tokenizer = from_folder(resolve_model(model))
        self.stopping, self.draft_tokens = StoppingParams(new_tokens), draft_tokens

    def measure(self, case: Case, prompts: list[Prompt], rounds: int) -> dict[str, Any]:
        """The figures of a case, by an engine of its own: what one has seen of acceptance stays with it."""
        engine = LocalEngine(self.decoder, self.config, self.types, draft=self.draft)
        plain = [self._request(number, prompt, case) for number, prompt in enumerate(prompts)]
        ahead = [_speculating(each, Speculation(case.proposer, self.draft_tokens)) for each in plain]
        groups = [slice(first, first + case.streams) for first in range(0, len(prompts), case.streams)]
        seconds = np.zeros((2, 1 + rounds, len(groups)))
        differing: set[int] = set()
        tokens = 0
        for turn in range(1 + rounds):
            for place, group in enumerate(groups):
                answers: dict[int, list[list[int]]] = {}
                for on in (0, 1) if turn % 2 else (1, 0):
                    seconds[on, turn, place], answers[on] = run(engine, (plain, ahead)[on][group])
                pairs = enumerate(zip(answers[0], answers[1], strict=True), group.start)
                differing |= {number for number, (one, other) in pairs if one != other}
                tokens += sum(map(len, answers[0])) if turn == 0 else 0
            if turn == 0:
                engine.messages.clear()
        drafted, accepted = told(engine)
        engine.close()
        timed = seconds[:, 1:]
        per_second = tokens / np.median(timed.sum(2), axis=1)
        figures = {
            "prompts": len(prompts),
            "tokens": tokens,
            "plain_tokens_per_second": float(per_second[0]),
            "tokens_per_second": float(per_second[1]),
            "ratio": ratio(timed, list(range(len(groups)))),
            "ratio_by_round": (timed[0].sum(1) / timed[1].sum(1)).tolist(),
            "drafted": drafted[case.proposer],
            "accepted": accepted[case.proposer],
            "differing_answers": len(differing),
            "floor": case.floor,
        }
        if case.streams == 1 and case.workload == "edit":
            places = {task: [at for at, prompt in enumerate(prompts) if prompt.task == task] for task in TASKS}
            figures["ratio_by_task"] = {task: ratio(timed, own) for task, own in places.items() if own}
        return asdict(case) | figures

    def _request(self, number: int, prompt: Prompt, case: Case) -> Generate:
        ids = self.tokenizer.encode_prompt(ChatPrompt((ChatMessage("user", prompt.message),)))
        names = sorted(folder.name for folder in ADAPTERS.iterdir()) if case.adapters else []
        adapters = (AdapterRef(names[number % len(names)]),) if names else ()
        sampling = SamplingParams(temperature=case.temperature, seed=number)
        return Generate(f"{number}", ids, sampling, self.stopping, adapters)


def _speculating(request: Generate, speculation: Speculation) -> Generate:
    sampling = msgspec.structs.replace(request.sampling, speculation=speculation)
    return msgspec.structs.replace(request, sampling=sampling)


def run(engine: LocalEngine, requests: list[Generate]) -> tuple[float, list[list[int]]]:
    """Seconds from the first step to the last, and the answers' tokens; raises the error of one that failed."""
    start = time.perf_counter()
    engine.run(*requests, timeout=PATIENCE)
    seconds = time.perf_counter() - start
    answers = [engine.answers.pop(request.request_id) for request in requests]
    if errors := [answer.error for answer in answers if answer.error is not None]:
        raise errors[0]
    return seconds, [answer.tokens() for answer in answers]


def told(engine: LocalEngine) -> tuple[Counter[str], Counter[str]]:
    """Tokens proposed and accepted by proposer, as the operator is told of them."""
    time.sleep(2 * INTERVAL)
    engine.step()
    drafted, accepted = Counter[str](), Counter[str]()
    for message in engine.messages:
        if isinstance(message, Stats):
            drafted.update(message.drafted)
            accepted.update(message.accepted)
    return drafted, accepted


def ratio(seconds: NDArray[np.float64], places: list[int]) -> float:
    """How many times as fast some groups are with proposals, the median of the rounds. seconds: [2, rounds, groups]."""
    sums = seconds[:, :, places].sum(2)
    return float(np.median(sums[0] / sums[1]))


def main(
    model: Annotated[str, typer.Option(help="As of lorry serve.")] = DEFAULT_MODEL,
    draft_model: Annotated[str | None, typer.Option(help="Measure it too; as of lorry serve.")] = None,
    draft_tokens: Annotated[int, typer.Option(help="Most tokens proposed at once.")] = 8,
    streams: Annotated[list[int] | None, typer.Option(help="Streams at once; 1, 4 and 16 by default.")] = None,
    prompts: Annotated[int, typer.Option(help="Of each case, but at least one for each stream.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 160,
    rounds: Annotated[int, typer.Option(help="The medians are of these.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One round, one stream, no adapters.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; torch's own number by default.")] = None,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("bench/results/speculation-cpu.json"),
) -> None:
    """Compare, time, write."""
    if threads:
        torch.set_num_threads(threads)
    load_before = os.getloadavg()[0]
    bench = Bench(model, draft_model, new_tokens, draft_tokens)
    figures = []
    for case in cases([1] if quick else streams or [1, 4, 16], draft_model is not None):
        if not (quick and case.adapters):
            asked = WORKLOADS[case.workload]()[: max(prompts, case.streams)]
            figures.append(bench.measure(case, asked, 1 if quick else rounds))
    result = machine() | {
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "model": Path(model).name,
        "draft_model": None if draft_model is None else Path(draft_model).name,
        "draft_tokens": draft_tokens,
        "new_tokens": new_tokens,
        "figures": figures,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(figures)
    missed = [each for each in figures if each["floor"] is not None and each["ratio"] < each["floor"]]
    raise typer.Exit(bool(missed) or any(each["differing_answers"] for each in figures))


def show(figures: list[dict[str, Any]]) -> None:
    table = Table("case", "tokens", "plain /s", "ahead /s", "ratio", "accepted", "differ")
    for each in figures:
        marks = [each["proposer"].replace("_", " "), f"{each['streams']} streams"]
        marks += [f"T={each['temperature']:g}"] * (each["temperature"] > 0) + ["adapters"] * each["adapters"]
        floor = each["floor"]
        color = "default" if floor is None else "green" if each["ratio"] >= floor else "red"
        table.add_row(
            f"{each['workload']}: {', '.join(marks)}",
            str(each["tokens"]),
            f"{each['plain_tokens_per_second']:.1f}",
            f"{each['tokens_per_second']:.1f}",
            f"[{color}]{each['ratio']:.2f}[/]",
            f"{each['accepted']} of {each['drafted']}",
            str(each["differing_answers"]),
        )
        for task, alone in each.get("ratio_by_task", {}).items():
            table.add_row(f"  {task}", "", "", "", f"{alone:.2f}", "", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
