"""The engine on a GPU against the engine on the CPU, over a small random Llama. Run by `make test-gpu`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.server.config import MIB, EngineConfig
from lorry.server.engine.graphs import row_buckets
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import Abort, Generate, LoadAdapter, Stats, UnloadAdapter
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MOST = 24


@pytest.fixture(scope="module")
def folders(small_folder: Path, write_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    adapters = tmp_path_factory.mktemp("adapters")
    decoder = load(small_folder, "cpu", "float32")
    for seed, rank in enumerate((3, 16, 17, 40, 64, 8, 200)):
        write_adapter(adapters / f"r{rank}", decoder, rank, seed)
    write_adapter(adapters / "activated", decoder, 8, 7, alora_invocation_tokens=[9])
    return small_folder, adapters


def load(folder: Path, device: str, dtype: str) -> Decoder:
    with torch.inference_mode():
        return load_model(str(folder), device=device, dtype=getattr(torch, dtype))


def engine_on(device: str, folders: tuple[Path, Path], dtype: str = "float32", **changes: Any) -> LocalEngine:
    model, adapters = folders
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "kv_dtype": dtype,
        "adapter_dtype": dtype,
        "adapter_memory": 16 * MIB,
        "adapters_dir": str(adapters),
        "kv_memory": 64 * MIB,
        "max_running": MOST,
        "token_budget": 96,
        "debug_checks": True,
    }
    return LocalEngine(load(model, device, dtype), EngineConfig(**options | changes))


def requests(generate: Any, count: int, **rest: Any) -> list[Any]:
    """All kinds of prompts and combos."""
    draw = random.Random(count)
    combos = [{}, {"r3": 1.0}, {"r16": 1.0}, {"r17": -0.5}, {"r40": 1.0, "r8": 0.5}, {"r64": 1.0}, {"r200": 0.7}]
    combos.append({"activated": 1.0})
    return [
        generate(
            str(number),
            draw.choices(range(2, 67), k=draw.choice([1, 15, 16, 17, 40, 100])),
            draw.choice([1, 15, 33]),
            adapters=combos[number % len(combos)],
            **rest,
        )
        for number in range(count)
    ]


def test_greedy_tokens_are_those_of_the_cpu(folders: Any, generate: Any) -> None:
    expected = engine_on("cpu", folders).generate(*requests(generate, 40))
    engine = engine_on("cuda", folders)
    answers = engine.generate(*requests(generate, 40))
    assert [answer.tokens() for answer in answers] == [answer.tokens() for answer in expected]
    engine.engine.check()


def test_seeded_draws_are_those_of_the_cpu(folders: Any, generate: Any) -> None:
    wishes = requests(generate, 20, temperature=0.8, seed=5)
    expected = engine_on("cpu", folders).generate(*wishes)
    answers = engine_on("cuda", folders).generate(*wishes)
    same = [answer.tokens() == other.tokens() for answer, other in zip(answers, expected, strict=True)]
    assert sum(same) >= 18  # a draw within rounding of a boundary may go the other way


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_log_probabilities_in_16_bits(folders: Any, generate: Any, dtype: str) -> None:
    draw = random.Random(3)
    wishes = [
        generate(str(number), draw.choices(range(2, 67), k=90), 1, adapters=combo, prompt_logprobs_from=1, logprobs=0)
        for number, combo in enumerate([{}, {"r16": 1.0}, {"r40": 1.0}, {"r200": 0.7, "r3": 0.3}])
    ]
    expected = engine_on("cpu", folders).generate(*wishes)
    answers = engine_on("cuda", folders, dtype).generate(*wishes)
    for answer, other in zip(answers, expected, strict=True):
        ours, theirs = (torch.tensor([each.logprob for each in a.prompt_logprobs]) for a in (answer, other))
        error = (ours - theirs).abs()
        print(f"{dtype}: max {error.max():.4f}, RMS {error.square().mean().sqrt():.4f}")
        assert error.square().mean().sqrt() < (0.05 if dtype == "bfloat16" else 0.01)


def test_every_bucket_edge(folders: Any, generate: Any) -> None:
    """Any number of rows, graphs or not, gives the tokens of a request alone."""
    engine, eager = engine_on("cuda", folders), engine_on("cuda", folders)
    eager.engine.runner.graphs = None
    sizes = sorted({max(1, rows + change) for rows in row_buckets(MOST) for change in (-1, 0, 1)} - {MOST + 1})
    alone: dict[int, list[int]] = {}
    for size in sizes:
        batch = [
            generate(
                f"{size}-{row}",
                [2 + row, 9, 11, *range(3, 3 + row)],
                6,
                adapters={"r17": 1.0} if row % 3 else {},
            )
            for row in range(size)
        ]
        answers = [answer.tokens() for answer in engine.generate(*batch)]
        assert answers == [answer.tokens() for answer in eager.generate(*batch)], size
        for row, tokens in enumerate(answers):
            assert alone.setdefault(row, tokens) == tokens, (size, row)
    long = generate("long", random.Random(4).choices(range(2, 67), k=1015), 20, adapters={"r40": 1.0})
    assert engine.generate(long)[0].tokens() == eager.generate(long)[0].tokens()


def test_adapters_come_and_go_while_others_decode(folders: Any, generate: Any) -> None:
    """1,000 steps in which two streams are repeated, while others load, replace, evict and unload adapters."""
    _, adapters = folders
    engine = engine_on("cuda", folders, adapter_memory=2 * MIB, adapter_roots=(str(adapters),))
    combos: list[dict[str, float]] = [{}, {"r16": 1.0}]

    def watched(when: int) -> list[Generate]:
        return [generate(f"{when}-w{n}", [5 + n, 7], 240, adapters=combo) for n, combo in enumerate(combos)]

    def running(wishes: list[Generate]) -> bool:
        return any(len(engine.answers[wish.request_id].completions) == 0 for wish in wishes) or any(
            engine.answers[wish.request_id].completions[0].finish is None for wish in wishes
        )

    expected = [answer.tokens() for answer in engine.generate(*watched(-1))]
    draw, call, steps = random.Random(1), 0, 0
    while steps < 1000:
        again = watched(steps)
        engine.send(*again)
        engine.step()
        while running(again):
            if draw.random() < 0.3:
                call += 1
                name = draw.choice(["r3", "r17", "r40", "r64", "r8", "r200"])
                engine.send(LoadAdapter(call, f"x{call % 5}", name, replace=True))
                prompt, count = [9, call % 60 + 2], draw.randrange(1, 9)
                engine.send(generate(f"o{call}", prompt, count, adapters={name: 1.0}))
            if draw.random() < 0.1:
                engine.send(UnloadAdapter(10_000 + steps, f"x{draw.randrange(5)}"))
            engine.step()
            steps += 1
        assert [engine.answers[wish.request_id].tokens() for wish in again] == expected
    engine.run(timeout=120)
    stats = [message for message in engine.messages if isinstance(message, Stats)]
    assert sum(each.adapter_evictions for each in stats) > 20
    engine.engine.check()


def test_memory_is_flat_over_many_requests(folders: Any, generate: Any) -> None:
    engine = engine_on("cuda", folders)
    draw = random.Random(2)

    def some(first: int, count: int) -> None:
        batch = [
            generate(
                str(number),
                draw.choices(range(2, 67), k=draw.randrange(1, 60)),
                draw.randrange(1, 5),
                adapters=draw.choice([{}, {"r3": 1.0}, {"r64": 1.0}]),
                temperature=draw.choice([0.0, 1.0]),
                seed=number,
            )
            for number in range(first, first + count)
        ]
        engine.send(*batch, *(Abort(wish.request_id) for wish in batch if draw.random() < 0.05))
        engine.run(timeout=600)
        for wish in batch:
            del engine.answers[wish.request_id]
        engine.messages.clear()

    some(0, 500)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    some(500, 9_500)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + MIB
