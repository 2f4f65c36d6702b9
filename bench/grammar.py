"""Times structured output: compiling, masks, and what they add to a step of the default model.

    python bench/grammar.py [--batch 1 --batch 16] [--steps 60] [--output FILE] [--no-step]

The time of a row of masks is that of `Grammar.masks` and `forbid` in the decoding, over outputs that grow by random
allowed tokens; no figure is printed unless the masks of a batch equal those of its rows alone. The share is that of a
real step of as many plain rows. Vocabularies: the default model's, and the same with as many pairs of its tokens as
make 128,256. Exits with 1 when the share at batch 16 is above its floor.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in the engine's process; before torch is imported

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from lorry.server.config import EngineConfig
from lorry.server.decoding.grammar import Grammar, forbid
from lorry.server.decoding.interface import Row
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import Generate, SamplingParams, StoppingParams
from lorry.server.grammars.compiling import compiled
from lorry.server.grammars.library import Library
from lorry.server.grammars.vocabulary import load_vocabulary
from lorry.server.model.load import load_model
from lorry.server.model.store import DEFAULT_MODEL, resolve_model
from lorry.server.params import StructuredOutput

console = Console()
EOS = 2
LARGE = 128_256
FLOOR, FLOOR_BATCH = 0.08, 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}},
    },
    "required": ["name", "age", "tags"],
}
GRAMMARS = {
    "json_schema": StructuredOutput("json_schema", json.dumps(PERSON)),
    "json_object": StructuredOutput("json_object"),
    "regex": StructuredOutput("regex", r"([A-Z][a-z]+ ){3,9}[0-9]{4}-[0-9]{2}"),
    "choice": StructuredOutput("choice", json.dumps([f"choice number {i}" for i in range(100)])),
}


def large_vocabulary(folder: Path, target: Path) -> None:
    """A tokenizer.json with LARGE tokens."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    texts = [text for text, token in vocabulary.items() if token >= 300]
    generator = np.random.default_rng(0)
    while len(vocabulary) < LARGE:
        a, b = generator.integers(len(texts), size=2)
        vocabulary.setdefault(texts[a] + texts[b], len(vocabulary))
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def rows_of(wanted: StructuredOutput, batch: int) -> list[Row]:
    sampling, stopping = SamplingParams(structured_output=wanted), StoppingParams(9999)
    return [Row(key, key, 0, [1], [], sampling, stopping, (EOS,)) for key in range(batch)]


def grow(row: Row, mask: Any, generator: np.random.Generator) -> None:
    """One more token, or the output begins again where nothing but its end is allowed."""
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    allowed = allowed[allowed != EOS]
    output: Any = row.output_token_ids
    output.append(int(generator.choice(allowed))) if len(allowed) else output.clear()


def mask_seconds(library: Library, vocab: int, wanted: StructuredOutput, batch: int, steps: int) -> list[float]:
    """Of each step with `batch` rows; the first tenth is warm-up."""
    grammar, rows, generator = Grammar(library, vocab), rows_of(wanted, batch), np.random.default_rng(1)
    logits, seconds, places = torch.zeros(batch, vocab), [], list(range(batch))
    for _ in range(steps):
        start = time.perf_counter()
        masks = grammar.masks(rows)
        forbid(rows, places, masks, logits)
        seconds.append(time.perf_counter() - start)
        alone = Grammar(library, vocab).masks(rows[-1:])
        assert np.array_equal(alone[0], masks[-1]), "a row's mask depends on its batch"
        for row, mask in zip(rows, masks, strict=True):
            grow(row, mask, generator)
        logits.zero_()
    return seconds[steps // 10 :]


def step_seconds(batch: int, steps: int) -> float:
    """The median step of the default model with `batch` sampled rows of 64 tokens of prompt."""
    with torch.inference_mode():
        engine = LocalEngine(load_model(DEFAULT_MODEL), EngineConfig(max_running=batch, token_budget=batch * 64))
    for key in range(batch):
        prompt = [1000 + 7 * key + i for i in range(64)]
        engine.send(Generate(str(key), prompt, SamplingParams(seed=key), StoppingParams(10 * steps, ignore_eos=True)))
    for _ in range(8):
        engine.step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(batches: list[int], steps: int, with_step: bool) -> Iterator[dict[str, Any]]:
    folder = resolve_model(DEFAULT_MODEL)
    step = {batch: step_seconds(batch, steps) if with_step else None for batch in batches}
    with tempfile.TemporaryDirectory() as name:
        large_vocabulary(folder, Path(name))
        for vocab, where in ((49_152, folder), (LARGE, Path(name))):
            start = time.perf_counter()
            vocabulary = load_vocabulary(where, vocab, (EOS,))
            loaded = time.perf_counter() - start
            library = Library(vocabulary)
            for kind, wanted in GRAMMARS.items():
                times = []
                for _ in range(5):
                    start = time.perf_counter()
                    compiled(wanted, vocabulary)
                    times.append(time.perf_counter() - start)
                for batch in batches:
                    seconds = mask_seconds(library, vocab, wanted, batch, steps)
                    yield {
                        "vocabulary": vocab,
                        "vocabulary_seconds": loaded,
                        "grammar": kind,
                        "compile_seconds": statistics.median(times),
                        "batch": batch,
                        "seconds": statistics.median(seconds),
                        "slowest": max(seconds),
                        "step_seconds": step[batch] if vocab == 49_152 else None,
                    }


def main(
    batch: Annotated[list[int] | None, typer.Option()] = None,
    steps: int = 60,
    output: Path | None = None,
    step: Annotated[bool, typer.Option(help="Time real steps to compare with.")] = True,
) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    figures = list(measure(batch or [1, 16, 64], steps, step))
    table = Table("vocabulary", "grammar", "compile ms", "batch", "masks ms", "slowest ms", "of a step")
    failed = False
    for each in figures:
        share = each["seconds"] / each["step_seconds"] if each["step_seconds"] else None
        failed |= share is not None and each["batch"] == FLOOR_BATCH and share > FLOOR
        table.add_row(
            str(each["vocabulary"]),
            each["grammar"],
            f"{each['compile_seconds'] * 1e3:.2f}",
            str(each["batch"]),
            f"{each['seconds'] * 1e3:.3f}",
            f"{each['slowest'] * 1e3:.2f}",
            "" if share is None else f"{share:.1%}",
        )
    console.print(table)
    if output is not None:
        about = {"processor": platform.processor(), "threads": torch.get_num_threads()}
        about |= {name: version(name) for name in ("torch", "llguidance")}
        output.write_text(json.dumps({"machine": about, "figures": figures}, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
