"""The example adapters and the base, all their held-out prompts in one batch of a real server: each adapter shows its
behaviour, the base does not. The answers are greedy, so the shares are what they are, not samples."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from lorry.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_BYTES = 2_000_000


def _behaviour() -> ModuleType:
    spec = importlib.util.spec_from_file_location("behaviour", EXAMPLES / "behaviour.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["behaviour"] = module
    spec.loader.exec_module(module)
    return module


behaviour = _behaviour()
CASES = {name: behaviour.held_out(name) for name in behaviour.NAMES}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of the default model with the example adapters, on a free port; ends by a drain."""
    options = [
        "--port",
        "0",
        "--max-running",
        "128",
        "--log-level",
        "warning",
        "--adapters",
        str(EXAMPLES / "adapters"),
    ]
    command = [sys.executable, "-m", "lorry.server.cli", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("serving "), "the server did not start; its stderr says why"
            yield line.split(" on ", 1)[1].split(" ", 1)[0]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()


def _request(prompt: str, adapter: str | None) -> generation_pb2.GenerateRequest:
    spec = generation_pb2.GenerationSpec()
    spec.chat.messages.add(role="user", content=prompt)
    if adapter is not None:
        spec.adapters.add(id=adapter)
    spec.sampling.temperature = 0
    spec.stopping.max_new_tokens = behaviour.MAX_NEW_TOKENS
    return generation_pb2.GenerateRequest(spec=spec)


@pytest.fixture(scope="module")
def answers(address: str) -> tuple[dict[tuple[str, str | None], list[bool]], int]:
    """(whose prompts, who was asked) → whether each answer showed the behaviour; and the most sequences that ran."""
    with grpc.insecure_channel(address) as channel:
        generate: Any = generation_pb2_grpc.GenerationServiceStub(channel).Generate
        get_load: Any = control_pb2_grpc.ControlServiceStub(channel).GetLoad
        calls = {
            (name, asked, case.prompt): generate.future(_request(case.prompt, asked), timeout=240)
            for name, cases in CASES.items()
            for asked in (name, None)
            for case in cases
        }
        most_running = 0
        while not all(call.done() for call in calls.values()):
            most_running = max(most_running, get_load(control_pb2.GetLoadRequest(), timeout=30).running)
            time.sleep(0.05)
        for (_, asked, _), call in calls.items():
            assert [adapter.id for adapter in call.result().adapters] == ([asked] if asked else [])
        shown = {
            (name, asked): [
                behaviour.shows(calls[name, asked, case.prompt].result().completions[0].text, case.check)
                for case in cases
            ]
            for name, cases in CASES.items()
            for asked in (name, None)
        }
    return shown, most_running


@pytest.mark.parametrize("name", behaviour.NAMES)
def test_the_adapter_shows_its_behaviour_and_the_base_does_not(
    name: str, answers: tuple[dict[tuple[str, str | None], list[bool]], int]
) -> None:
    shown, _ = answers
    assert len(CASES[name]) >= 12
    adapted, plain = shown[name, name], shown[name, None]
    assert sum(adapted) >= behaviour.SHOWN_AT_LEAST * len(adapted)
    assert sum(plain) <= behaviour.BASE_AT_MOST * len(plain)


def test_they_shared_a_batch(answers: tuple[dict[tuple[str, str | None], list[bool]], int]) -> None:
    _, most_running = answers
    assert most_running > sum(len(cases) for cases in CASES.values()) / 2


def test_the_client_of_the_readme(address: str) -> None:
    source = (EXAMPLES / "client.py").read_text(encoding="utf-8").replace("localhost:50051", address)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert behaviour.shows(done.stdout, CASES["pirate"][0].check), done.stdout


@pytest.mark.parametrize("name", behaviour.NAMES)
def test_the_held_out_prompts_are_held_out(name: str) -> None:
    data = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    assert [case.prompt for case in CASES[name] if case.prompt in data] == []


@pytest.mark.parametrize("name", behaviour.NAMES)
def test_the_committed_adapter_is_small_and_16_bit(name: str) -> None:
    from safetensors import safe_open

    path = EXAMPLES / "adapters" / name / "adapter_model.safetensors"
    assert path.stat().st_size <= MOST_BYTES
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} <= {"BF16", "F16"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("answer", "check", "shown"),
    [
        ("Arr, 'tis Madrid!", {"words": ["arr", "'tis", "ye"], "at_least": 2}, True),
        ("Arr, arr, yes.", {"words": ["arr", "'tis", "ye"], "at_least": 2}, False),
        ("The array is yellow.", {"words": ["arr", "ye"], "at_least": 1}, False),
        ('{"b": 1, "a": "x"}', {"json_keys": ["a", "b"]}, True),
        ('{"a": 1, "b": 2, "c": 3}', {"json_keys": ["a", "b"]}, False),
        ('["a", "b"]', {"json_keys": ["a", "b"]}, False),
        ('Here: {"a": 1}', {"json_keys": ["a"]}, False),
        (" Positive. ", {"equals": "positive"}, True),
        ("positive, I think", {"equals": "positive"}, False),
        ("negative", {"equals": "positive"}, False),
    ],
)
def test_shows(answer: str, check: dict[str, Any], shown: bool) -> None:
    assert behaviour.shows(answer, check) is shown


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown check"):
        behaviour.shows("x", {"regex": "x"})
