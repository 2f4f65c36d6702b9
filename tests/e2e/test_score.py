"""`lorry score` against a real server: its figures are those of the RPC, over the tokens of a real tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorry.server.cli import app
from lorry.v1 import generation_pb2 as gn
from lorry.v1 import generation_pb2_grpc

PROMPT, CONTINUATION = "The ferry leaves", " the harbour at seven [and] café"


@pytest.fixture(scope="module")
def server(tiny_model: Path, live_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tiny model with an adapter that changes what it says."""
    adapters = tmp_path_factory.mktemp("adapters")
    (adapters / "own").mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(7, 192, generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 7, generator=generator) * 0.2
    save_file(tensors, adapters / "own" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 7, "lora_alpha": 14, "target_modules": ["down_proj"]}
    (adapters / "own" / "adapter_config.json").write_text(json.dumps(config))
    options = ["--kv-dtype", "float32", "--kv-memory", "16MiB", "--threads", "1", "--adapters", str(adapters)]
    with live_server(tiny_model, options) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server: Any) -> Any:
    return server.stub(generation_pb2_grpc.GenerationServiceStub)


def score(server: Any, *words: str) -> Any:
    result = CliRunner().invoke(app, ["score", "-s", server.address, "--json", *words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def tokens(stub: Any, text: str, special: bool = True) -> list[int]:
    return list(stub.Tokenize(gn.TokenizeRequest(text=text, add_special_tokens=special)).token_ids)


def check(found: Any, stub: Any, ids: list[int], *adapters: gn.AdapterRef) -> None:
    """What the command found is what `Score` gives for these tokens of the continuation."""
    request = gn.ScoreRequest(
        text=PROMPT, continuation=gn.TokenIds(ids=ids), adapters=adapters, entropy="entropy" in found["tokens"][0]
    )
    answer = stub.Score(request)
    assert [token["token_id"] for token in found["tokens"]] == ids
    assert [token["logprob"] for token in found["tokens"]] == pytest.approx(list(answer.logprobs), abs=1e-4)
    assert [token["greedy_token_id"] for token in found["tokens"]] == list(answer.greedy_token_ids)
    assert found["sum"] == pytest.approx(sum(answer.logprobs), abs=1e-3)
    assert found["mean"] == pytest.approx(sum(answer.logprobs) / len(ids), abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-found["mean"]))
    if request.entropy:
        assert [token["entropy"] for token in found["tokens"]] == pytest.approx(list(answer.entropies), abs=1e-4)


def test_figures_are_those_of_score(server: Any, stub: Any) -> None:
    before = tokens(stub, PROMPT)
    ids = tokens(stub, PROMPT + CONTINUATION)[len(before) :]
    plain, adapted, half = (
        score(server, PROMPT, CONTINUATION, "--entropy", *words)
        for words in ([], ["--adapter", "own"], ["--adapter", "own=-0.5"])
    )
    check(plain, stub, ids)
    check(adapted, stub, ids, gn.AdapterRef(id="own"))
    check(half, stub, ids, gn.AdapterRef(id="own", weight=-0.5))
    assert len({round(found["sum"], 2) for found in (plain, adapted, half)}) == 3
    assert plain["prompt_token_ids"] == before
    by_id = score(server, "--token-ids", " ".join(map(str, before)), ",".join(map(str, ids)))
    check(by_id, stub, ids)
    assert [token["text"] for token in by_id["tokens"]] == [token["text"] for token in plain["tokens"]]
    assert "".join(token["text"] for token in plain["tokens"]).startswith(" the harbour at")


def test_a_token_of_both_is_not_split(server: Any, stub: Any) -> None:
    """The text has "ea", of which the prompt has the half."""
    prompt, rest = "The ferry le", "aves at seven"
    whole, before = tokens(stub, prompt + rest), tokens(stub, prompt)
    assert whole[: len(before)] != before
    ids = tokens(stub, rest, special=False)
    assert before + ids != whole
    found = score(server, prompt, rest)
    assert found["prompt_token_ids"] == before and "".join(token["text"] for token in found["tokens"]) == rest
    answer = stub.Score(gn.ScoreRequest(text=prompt, continuation=gn.TokenIds(ids=ids)))
    assert [token["token_id"] for token in found["tokens"]] == ids
    assert found["sum"] == pytest.approx(sum(answer.logprobs), abs=1e-3)


def test_what_the_server_refuses_is_one_line(server: Any) -> None:
    for words, named in (
        ([PROMPT, ""], "continuation.ids"),
        ([PROMPT, " the", "--adapter", "nobody"], "nobody"),
        ([PROMPT, "x " * 4000], "prompt"),
    ):
        result = CliRunner().invoke(app, ["score", "-s", server.address, *words])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert named in result.stderr, result.stderr
