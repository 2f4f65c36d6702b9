"""`lorry score` against a real channel; the frontend below has no engine, and a tokenizer of five words."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorry.server import errors
from lorry.server.cli import app
from lorry.server.commands import values
from lorry.server.frontend.request import TokenPrompt

BEGIN = 1
WORDS = {"once": 5, " up": 6, "on": 7, "upon": 8, " upon": 9, "[b]": 10}
TEXTS = {token: word for word, token in WORDS.items()} | {BEGIN: "<s>", 3: " a\n", 4: "�"}


@pytest.fixture
def address(server: Any, frontend: Any) -> str:
    async def tokenize(prompt: Any, *, add_special_tokens: bool = True) -> list[int]:
        ids, rest = [BEGIN] * add_special_tokens, prompt.text
        while rest:
            word = max((word for word in WORDS if rest.startswith(word)), key=len)
            ids.append(WORDS[word])
            rest = rest[len(word) :]
        return ids

    async def detokenize(token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(TEXTS[token] for token in token_ids)

    frontend.tokenize, frontend.detokenize = tokenize, detokenize
    return f"127.0.0.1:{server.port}"


async def lorry_score(address: str, *arguments: str, stdin: str | None = None) -> Result:
    """In a thread: the command uses grpc's blocking API, the server lives in this loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["score", "-s", address, *arguments], input=stdin)


@pytest.mark.parametrize(
    ("prompt", "continuation", "before", "scored"),
    [
        ("once", " uponon", [BEGIN, 5], [9, 7]),  # as one text
        ("", "onceon", [BEGIN], [5, 7]),
        ("once up", "onon", [BEGIN, 5, 6], [7, 7]),  # " upon" is a token: by itself, without <s>
    ],
)
async def test_how_the_continuation_is_tokenized(
    frontend: Any, address: str, prompt: str, continuation: str, before: list[int], scored: list[int]
) -> None:
    for words, stdin in (([prompt], None), (["-"], prompt)):
        result = await lorry_score(address, *words, continuation, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        assert frontend.scored[:2] == (TokenPrompt(tuple(before)), tuple(scored))
        assert ("by itself" in result.stderr) == (prompt == "once up")
        assert json.loads(result.stdout)["prompt_token_ids"] == before


async def test_json_holds_all_of_it(frontend: Any, address: str) -> None:
    words = ["once", " uponon", "--adapter", "a", "-a", "b=-0.5", "--entropy", "--json", "--timeout", "60"]
    found = json.loads((await lorry_score(address, *words)).stdout)
    assert found == {
        "prompt_token_ids": [BEGIN, 5],
        "tokens": [
            {
                "token_id": 9,
                "text": " upon",
                "logprob": -0.5,
                "greedy_token_id": 3,
                "greedy_text": " a\n",
                "entropy": 0.25,
            },
            {"token_id": 7, "text": "on", "logprob": -1.5, "greedy_token_id": 4, "greedy_text": "�", "entropy": 0.75},
        ],
        "sum": -2.0,
        "mean": -1.0,
        "perplexity": pytest.approx(math.e),
    }
    _, _, adapters, deadline = frontend.scored
    assert [(each.id, each.weight) for each in adapters] == [("a", 1.0), ("b", -0.5)] and deadline is not None
    plain = json.loads((await lorry_score(address, *words[:2], "--json")).stdout)
    assert all("entropy" not in token for token in plain["tokens"]) and frontend.scored[3] is None


async def test_a_table_and_its_sum(address: str) -> None:
    result = await lorry_score(address, "once", "[b]on", "--entropy")
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.stdout.splitlines()] == [
        "token  log-probability  most likely  entropy",
        '"[b]"          -0.5000  " a\\n"        0.2500',
        '"on"           -1.5000  "�"           0.7500',
        "sum -2.0000, mean -1.0000, perplexity 2.7183",
    ]
    assert "entropy" not in (await lorry_score(address, "once", "onon")).stdout


async def test_token_ids_need_no_tokenizer(frontend: Any, address: str) -> None:
    async def refused(*_: Any, **__: Any) -> Any:
        raise errors.InvalidField("the model has no tokenizer", field="token_ids")

    frontend.tokenize = refused
    words = ["--token-ids", "5, 6", "7 9"]
    assert json.loads((await lorry_score(address, *words, "--json")).stdout)["tokens"][0]["text"] == "on"
    frontend.detokenize = refused
    result = await lorry_score(address, *words)
    assert frontend.scored[:2] == (TokenPrompt((5, 6)), (7, 9))
    assert [line.split() for line in result.stdout.splitlines()[1:3]] == [["7", "-0.5000", "3"], ["9", "-1.5000", "4"]]
    assert json.loads((await lorry_score(address, *words, "--json")).stdout)["tokens"][1]["text"] is None
    result = await lorry_score(address, "once", "on")
    assert result.exit_code == 1 and "no tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["once", ""], 1, "continuation.ids"),
        (["--token-ids", "5", ""], 1, "continuation.ids"),
        (["--token-ids", "", "5"], 1, "token_ids.ids"),
        (["--token-ids", "5", "6 400"], 1, "continuation.ids[1]"),
        (["--token-ids", "five", "6"], 2, "for PROMPT"),
        (["--token-ids", "5", "6 -1"], 2, "for CONTINUATION"),
        (["--token-ids", "5", f"{1 << 32}"], 2, "for CONTINUATION"),
        (["once", "on", "--adapter", "a=b"], 2, "ID=WEIGHT"),
        (["once", "on", "--adapter", "a b"], 1, "adapters[0].id"),
        (["once", "on", "-a", "a", "-a", "a"], 1, "adapters[1].id"),
        (["once"], 2, "Missing argument"),
    ],
)
async def test_what_is_wrong_is_named(frontend: Any, address: str, words: list[str], code: int, named: str) -> None:
    result = await lorry_score(address, *words)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert named in result.stderr and frontend.scored is None
    assert code == 2 or result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["1, 2 3", "1,2,3", " 1\n2 3\n"])
def test_token_ids_as_people_write_them(text: str) -> None:
    assert values.token_ids(text, "PROMPT") == [1, 2, 3]
