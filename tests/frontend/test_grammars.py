"""Grammars are compiled in a process that may be killed, before the engine hears of their requests."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lorry.server.errors import Draining, EngineUnavailable, InvalidField
from lorry.server.frontend.grammars import GrammarChecks
from lorry.server.grammars.job import Vocabulary
from lorry.server.params import StructuredOutput

WORD = StructuredOutput("regex", "[a-z]+")

# Stands for the process: what it does with a grammar is its text.
FAKE = """
import json, os, sys, time
sys.stdin.readline()
print("{}", flush=True)
for line in sys.stdin:
    text = json.loads(line)["text"]
    print("asked", text, file=open(sys.argv[1], "a"), flush=True)
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os.abort()
    fields = {"field": "structured_output.regex"}
    error = {"kind": "InvalidField", "message": "no", "fields": fields} if text == "bad" else {}
    print(json.dumps(error), flush=True)
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
async def checks(log: Path) -> AsyncIterator[Callable[..., GrammarChecks]]:
    made: list[GrammarChecks] = []

    def make(script: str = FAKE, **options: Any) -> GrammarChecks:
        about = Vocabulary(folder="nowhere", vocab_size=7, eos_token_ids=(1,))
        made.append(GrammarChecks(about, command=(sys.executable, "-c", script, str(log)), **options))
        return made[-1]

    yield make
    for each in made:
        await each.close()


def read(log: Path) -> str:
    return log.read_text()


def regex(text: str) -> StructuredOutput:
    return StructuredOutput("regex", text)


async def test_verdicts_are_kept(checks: Any, log: Path) -> None:
    asked = checks(kept=2)
    for _ in range(3):
        await asked.check(regex("good"))
        with pytest.raises(InvalidField, match="no") as caught:
            await asked.check(regex("bad"))
        assert caught.value.fields["field"] == "structured_output.regex"
    await asyncio.gather(*(asked.check(regex("good")) for _ in range(20)))
    assert read(log).split("\n")[:-1] == ["asked good", "asked bad"]
    await asked.check(regex("third"))
    with pytest.raises(InvalidField):
        await asked.check(regex("bad"))  # pushed out by the third
    assert read(log).split("\n")[2:-1] == ["asked third", "asked bad"]


async def test_one_that_takes_too_long_is_refused_and_the_next_is_served(checks: Any, log: Path) -> None:
    asked = checks(seconds=0.3)
    await asked.check(regex("good"))
    start = time.monotonic()
    hanging = asyncio.create_task(asked.check(regex("hang")))
    after = asyncio.create_task(asked.check(regex("after")))
    with pytest.raises(InvalidField, match=r"structured_output\.regex is refused: it takes more than 0\.3 s"):
        await hanging
    await after
    assert time.monotonic() - start < 30
    with pytest.raises(InvalidField, match="more than"):
        await asked.check(regex("hang"))  # not tried again
    assert read(log).count("hang") == 1


async def test_one_that_ends_the_process_is_refused_and_the_next_is_served(checks: Any, log: Path) -> None:
    asked = checks()
    with pytest.raises(InvalidField, match="too much memory"):
        await asked.check(regex("die"))
    await asked.check(regex("good"))
    assert read(log).count("die") == 2


async def test_a_client_that_leaves_takes_no_answer_with_it(checks: Any) -> None:
    asked = checks()
    await asked.check(regex("first"))
    hanging = asyncio.create_task(asked.check(regex("hang")))
    await asyncio.sleep(0.1)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging
    await asked.check(regex("good"))
    with pytest.raises(InvalidField):
        await asked.check(regex("bad"))


async def test_a_process_that_does_not_start_and_one_that_was_closed(checks: Any) -> None:
    with pytest.raises(EngineUnavailable):
        await checks("raise SystemExit(3)").check(regex("good"))
    closed = checks()
    await closed.close()
    with pytest.raises(Draining):
        await closed.check(regex("good"))


async def test_the_real_process(smollm2_folder: Path) -> None:
    about = Vocabulary(folder=str(smollm2_folder), vocab_size=49_152, eos_token_ids=(2,))
    real = GrammarChecks(about, seconds=20.0)
    try:
        await real.check(WORD)
        with pytest.raises(InvalidField, match="uniqueItems"):
            await real.check(StructuredOutput("json_schema", '{"uniqueItems": true}'))
        assert real._process is not None
        os.kill(real._process.pid, signal.SIGKILL)
        await real.check(regex("[0-9]+"))
    finally:
        await real.close()


async def test_a_model_without_a_vocabulary(tmp_path: Path) -> None:
    real = GrammarChecks(Vocabulary(folder=str(tmp_path), vocab_size=7, eos_token_ids=(1,)))
    try:
        with pytest.raises(InvalidField, match="no tokenizer"):
            await real.check(WORD)
    finally:
        await real.close()
