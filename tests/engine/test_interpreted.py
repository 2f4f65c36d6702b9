"""The whole engine on a GPU's path, its kernels in Triton's interpreter: the CPU engine's tokens come out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.server.config import MIB, EngineConfig
from lorry.server.engine.build import Types
from lorry.server.engine.graphs import Bucket
from lorry.server.engine.local import LocalEngine
from lorry.server.model.load import load_model


def test_prompts_and_decoding_with_adapters_and_graphs(
    small_folder: Path, tmp_path: Path, generate: Any, write_adapter: Any, request: pytest.FixtureRequest
) -> None:
    with torch.inference_mode():
        decoder = load_model(str(small_folder))
    for seed, (name, rank) in enumerate({"a": 5, "b": 19}.items()):
        write_adapter(tmp_path / name, decoder, rank, seed)
    write_adapter(tmp_path / "c", decoder, 3, 9, alora_invocation_tokens=[6, 4])
    config = EngineConfig(
        kv_dtype="float32",
        adapter_dtype="float32",
        adapter_memory=2 * MIB,
        adapters_dir=str(tmp_path),
        kv_memory=1 * MIB,
        max_running=4,
        token_budget=32,
        debug_checks=True,
    )
    requests = [
        generate("base", [3, 5, 7], 3),
        generate("one", [9, 8], 3, adapters={"a": 1.0}),
        generate("mix", list(range(9, 27)), 3, adapters={"b": 0.5, "a": -0.75}),
        generate("activated", [3, 5, 6, 4], 3, adapters={"c": 1.0}),
    ]
    engine = LocalEngine(decoder, config)
    expected = [answer.tokens() for answer in engine.generate(*requests)]
    engine.close()
    assert len({tuple(tokens) for tokens in expected}) == 4

    request.getfixturevalue("interpreted")
    with torch.inference_mode():
        decoder = load_model(str(small_folder))
    engine = LocalEngine(decoder, config, replace(Types.choose(config), ahead=True))
    runner = engine.engine.runner
    with torch.inference_mode():
        assert list(runner.record([Bucket(4, 2, 0), Bucket(4, 2, 4)])) == [Bucket(4, 2, 4), Bucket(4, 2, 0)]
    engine.run(*requests, timeout=300)
    assert [engine.answers[request.request_id].tokens() for request in requests] == expected
    engine.engine.check()
    engine.close()
