"""The command line against a real channel; the frontend below has no engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import lorry
from lorry.server import errors
from lorry.server.cli import app
from lorry.server.commands import config_options, request_spec, values
from lorry.server.config import EngineConfig, ServerConfig, engine_config_from_json, to_json
from lorry.server.engine.messages import AdapterState, Dry, Mirostat
from lorry.server.frontend.request import ChatMessage, ChatPrompt, SpeculationWish, TextPrompt, TokenPrompt
from lorry.server.params import DoLa, StructuredOutput

runner = CliRunner()


async def lorry_cli(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command in a thread: it uses grpc's blocking API, the server lives in this loop."""
    return await asyncio.to_thread(runner.invoke, app, list(arguments), input=stdin)


@pytest.fixture
def address(server: Any) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture
async def answering(frontend: Any, helpers: Any) -> Any:
    """Every request gets the same events; the fixture is the list of handles."""
    handles: list[Any] = []

    async def answer() -> None:
        while True:
            handle = await frontend.handles.get()
            handles.append(handle)
            events = helpers.events_of(handle.request)
            one = [event for event in events if getattr(event, "index", 0) == 0]
            handle.put(*(events if handle.request.sampling.n > 1 else one), None)

    task = asyncio.ensure_future(answer())
    yield handles
    task.cancel()


async def test_generate_prints_the_text(answering: Any, address: str) -> None:
    result = await lorry_cli("generate", "hello", "-s", address)
    assert result.exit_code == 0
    assert result.stdout == "aä\n"
    assert "5 prompt tokens, 2 new ones, 1.0 tokens/s, ended: length" in result.stderr
    assert answering[0].request.prompt == TextPrompt("hello")


async def test_generate_hands_over_every_option(answering: Any, address: str) -> None:
    words = (
        "generate -s {} --adapter a --adapter b=-0.5 --request-id mine --priority -3 --cache-salt s "
        "--temperature 0.5 --top-p 0.25 --top-k 7 --min-p 0.125 --typical-p 0.75 --seed 18446744073709551615 "
        "--epsilon-cutoff 0.5 --eta-cutoff 0.25 --top-n-sigma 1.5 --dry 0.5,2,3,9 --dry-breaker x "
        "--no-repeat-ngram-size 4 --bad-word foo --bad-word-ids 5,6 --allowed-token-id 5 "
        "--repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 2 --logit-bias 3=-4.5 "
        "--logit-bias 5=6 --n 2 --max-new-tokens 9 --min-new-tokens 2 --stop x --stop y --stop-token-id 4 "
        "--ignore-eos --time-limit 1.5 --logprobs 0 --prompt-logprobs --entropy --include-prompt --include-stop "
        "--timeout 60 --json --token-ids"
    )
    result = await lorry_cli(*words.format(address).split(), "1, 2 3")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [completion["text"] for completion in answer["completions"]] == ["aä", "b"]
    assert answer["request_id"] == "mine"
    request = answering[0].request
    assert request.prompt == TokenPrompt((1, 2, 3))
    assert [(ref.id, ref.weight) for ref in request.adapters] == [("a", 1.0), ("b", -0.5)]
    assert (request.request_id, request.priority, request.cache_salt) == ("mine", -3, "s")
    sampling, stopping, response = request.sampling, request.stopping, request.response
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.seed, sampling.n) == (2**64 - 1, 2)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.5, -1.0, 2.0)
    assert sampling.logit_bias == {3: -4.5, 5: 6.0}
    cuts = (sampling.typical_p, sampling.epsilon_cutoff, sampling.eta_cutoff, sampling.top_n_sigma)
    assert cuts == (0.75, 0.5, 0.25, 1.5)
    assert (sampling.dry, request.texts.sequence_breakers) == (Dry(0.5, 2.0, 3, (), 9), ("x",))
    assert (sampling.no_repeat_ngram_size, sampling.allowed_token_ids) == (4, (5,))
    assert sampling.bad_words == ((5, 6),)
    assert [text for text, _ in request.texts.bad_words] == ["foo"]
    assert (stopping.max_new_tokens, stopping.min_new_tokens, stopping.time_limit) == (9, 2, 1.5)
    assert (stopping.stop, stopping.stop_token_ids, stopping.ignore_eos) == (("x", "y"), (4,), True)
    assert dataclasses.astuple(response) == (0, True, True, True, True)
    assert request.deadline is not None


async def test_generate_hands_over_mirostat(answering: Any, address: str) -> None:
    assert (await lorry_cli("generate", "-s", address, "--mirostat", "4,0.25", "hello")).exit_code == 0
    assert answering[0].request.sampling.mirostat == Mirostat(4.0, 0.25)
    assert (await lorry_cli("generate", "-s", address, "--mirostat", "3", "hello")).exit_code == 0
    assert answering[1].request.sampling.mirostat.tau == 3.0


@pytest.mark.parametrize(
    ("words", "wanted"), [("low", DoLa(bucket="low")), ("high", DoLa(bucket="high")), ("0,2,1", DoLa((0, 1, 2)))]
)
async def test_generate_contrasts_layers(answering: Any, address: str, words: str, wanted: DoLa) -> None:
    result = await lorry_cli("generate", "-s", address, "--dola", words, "hello")
    assert result.exit_code == 0, result.output
    assert answering[0].request.sampling.dola == wanted


@pytest.mark.parametrize("words", ["lowest", "1,x", "-1", "5000000000"])
async def test_generate_refuses_what_is_no_layer(address: str, words: str) -> None:
    result = await lorry_cli("generate", "-s", address, "--dola", words, "hello")
    assert result.exit_code == 2 and "--dola" in result.output


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--speculation off", SpeculationWish("off")),
        ("--speculation prompt-lookup --draft-tokens 5", SpeculationWish("prompt_lookup", 5)),
        ("--speculation draft-model --no-adaptive", SpeculationWish("draft_model", None, False)),
        ("--draft-tokens 3 --adaptive", SpeculationWish(None, 3, True)),
    ],
)
async def test_generate_speculates(answering: Any, address: str, words: str, wanted: SpeculationWish) -> None:
    result = await lorry_cli("generate", "-s", address, *words.split(), "hello")
    assert result.exit_code == 0, result.output
    assert answering[0].request.speculation == wanted


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--json-object"], StructuredOutput("json_object")),
        (["--json-schema", '{"type": "null"}'], StructuredOutput("json_schema", '{"type": "null"}')),
        (["--regex", "[a-z]+", "--skip-forced"], StructuredOutput("regex", "[a-z]+", True)),
        (["--choice", "yes", "--choice", "no"], StructuredOutput("choice", '["yes", "no"]')),
        (["--grammar", 'start: "a"'], StructuredOutput("grammar", 'start: "a"')),
    ],
)
async def test_generate_structured(answering: Any, address: str, words: list[str], wanted: StructuredOutput) -> None:
    result = await lorry_cli("generate", "-s", address, *words, "hello")
    assert result.exit_code == 0, result.output
    assert answering[0].request.sampling.structured_output == wanted


async def test_generate_reads_a_schema_from_a_file(answering: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    result = await lorry_cli("generate", "-s", address, "--json-schema", str(tmp_path / "schema.json"), "hello")
    assert result.exit_code == 0, result.output
    assert answering[0].request.sampling.structured_output == StructuredOutput("json_schema", "{}")
    for words in (["--regex", "a", "--choice", "b"], ["--skip-forced"]):
        assert (await lorry_cli("generate", "-s", address, *words, "hello")).exit_code == 2


async def test_generate_chat_reads_stdin(answering: Any, address: str) -> None:
    result = await lorry_cli("generate", "-s", address, "--system", "be brief", stdin="what?")
    assert result.exit_code == 0
    messages = (ChatMessage("system", "be brief"), ChatMessage("user", "what?"))
    assert answering[0].request.prompt == ChatPrompt(messages)


async def test_generate_streams(answering: Any, address: str) -> None:
    result = await lorry_cli("generate", "-s", address, "--stream", "hello")
    assert (result.exit_code, result.stdout) == (0, "aä\n")
    result = await lorry_cli("generate", "-s", address, "--stream", "--json", "-n", "2", "hello")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [next(iter(event)) for event in events][:3] == ["started", "prompt_logprobs", "delta"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.QueueFull("all are\nbusy"), "UNAVAILABLE: all are busy (try again in 1 s)"),
        (errors.NotFound("no adapter 'x'"), "NOT_FOUND: no adapter 'x'"),
        (RuntimeError("secret"), "INTERNAL: internal error"),
    ],
)
@pytest.mark.parametrize("mode", ["--stream", "--json"])
async def test_a_failure_is_one_line_and_exit_code_1(
    frontend: Any, address: str, error: Exception, words: str, mode: str
) -> None:
    frontend.refusal = error
    result = await lorry_cli("generate", "-s", address, mode, "hello")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {words}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--adapter", "a=b", "x"],
        ["generate", "--logit-bias", "3", "x"],
        ["generate", "--top-k", "-1", "x"],
        ["generate", "--seed", "-1", "x"],
        ["generate", "--token-ids", "one two"],
        ["generate", "--token-ids", "-1"],
        ["generate", "--token-ids", "--chat", "1 2"],
        ["generate", "--no-such-option", "x"],
        ["generate", "--mirostat", "5,0.1,3", "x"],
        ["generate", "--dry", "1,2,2.5", "x"],
        ["generate", "--dry", "1,2,-1", "x"],
        ["generate", "--dry-breaker", "a", "x"],
        ["generate", "--bad-word-ids", "1;2", "x"],
        ["generate", "--speculation", "lookup", "x"],
        ["generate", "--draft-tokens", "-1", "x"],
        ["serve", "--port", "65536"],
        ["serve", "--max-running", "0"],
        ["serve", "--kv-memory", "much"],
        ["serve", "--dtype", "int3"],
        ["adapters", "load", "a"],
        ["quantize", "a"],
    ],
)
async def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert (await lorry_cli(*arguments)).exit_code == 2


async def test_no_server_is_said(unused_tcp_port: int) -> None:
    result = await lorry_cli("adapters", "list", "-s", f"127.0.0.1:{unused_tcp_port}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no answer from a server at 127.0.0.1")


async def test_chat_keeps_the_conversation(frontend: Any, answering: Any, address: str) -> None:
    lines = "one\n\n/adapter p=2\ntwo\n/adapter q=x\n/what\n/reset\nthree\n/quit\nfour\n"
    words = f"chat -s {address} --system s -t 0 -a a --speculation off"
    result = await lorry_cli(*words.split(), stdin=lines)
    assert result.exit_code == 0
    assert result.stdout == "aä\n" * 3
    requests = [handle.request for handle in answering]
    assert [[message.content for message in request.prompt.messages] for request in requests] == [
        ["s", "one"],
        ["s", "one", "aä", "two"],
        ["s", "three"],
    ]
    assert [request.adapters[0].id for request in requests] == ["a", "p", "p"]
    assert {request.speculation for request in requests} == {SpeculationWish("off")}
    assert "'q=x' is no adapter" in result.stderr
    assert "unknown command /what" in result.stderr


async def test_chat_goes_on_after_a_refused_turn(frontend: Any, answering: Any, address: str) -> None:
    frontend.refusal = errors.NotFound("no adapter 'x'")
    result = await lorry_cli("chat", "-s", address, stdin="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stderr.count("NOT_FOUND: no adapter 'x'") == 2


async def test_adapters(frontend: Any, address: str, helpers: Any) -> None:
    result = await lorry_cli("adapters", "load", "p", "dir/p", "-s", address, "--pin", "--replace")
    assert (result.exit_code, result.stdout) == (0, "p: device, pinned, rank 40, revision 0123456789ab\n")
    assert frontend.adapters.calls == [("load", "p", "dir/p", None, True, True)]
    failed = helpers.adapter_info(
        "b", state=AdapterState.FAILED, revision="", rank=0, bytes=0, in_flight=0, error="use_dora"
    )
    frontend.adapters.known["b"] = failed
    table = (await lorry_cli("adapters", "list", "-s", address)).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["id", "b", "p"]
    assert "use_dora" in table[1]
    assert "device (pinned)" in table[2]
    objects = (await lorry_cli("adapters", "list", "--json", "-s", address)).stdout.splitlines()
    assert [json.loads(line)["id"] for line in objects] == ["b", "p"]
    assert (await lorry_cli("adapters", "pin", "p", "--off", "-s", address)).exit_code == 0
    assert not frontend.adapters.known["p"].pinned
    assert (await lorry_cli("adapters", "unload", "p", "-s", address)).exit_code == 0
    assert (await lorry_cli("adapters", "unload", "p", "-s", address)).exit_code == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2 * 10**9), ("1KB", 1000)],
)
def test_sizes(text: str, size: int) -> None:
    assert values.size(text) == size
    assert values.size(values.size_text(size)) == size


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", -1, "-1 does not fit --seed; accepted: whole numbers, 0 to 18446744073709551615"),
        ("top_k", 2**32, "4294967296 does not fit --top-k; accepted: whole numbers, 0 to 4294967295"),
        ("priority", 2**31, "2147483648 does not fit --priority; accepted: whole numbers, ±2147483647"),
        ("allowed_token_ids", [3, -1], "[3, -1] does not fit --allowed-token-id; accepted: whole numbers, 0 to"),
        ("logit_bias", ["-1=3"], "-1=3 does not fit --logit-bias; accepted: token ids of 0 to 4294967295"),
        ("bad_word_ids", ["4,-1"], "4,-1 does not fit --bad-word-ids; accepted: token ids of 0 to 4294967295"),
        ("time_limit", 1e30, "1e+30 does not fit --time-limit; accepted: above 0 to 86400 seconds"),
        ("dola", "3,-1", "3,-1 does not fit --dola; accepted: low, high, or layers, 0 to 4294967295"),
        ("dry", "0.8,1.75,2.5", "2.5 does not fit allowed_length of --dry; accepted: whole numbers, 0 to"),
        ("beam_width", -2, "-2 does not fit --beam-width; accepted: whole numbers, 0 to 4294967295"),
        ("best_of_by", "most", "most does not fit --best-of-by; accepted: mean or sum"),
        ("draft_tokens", -2, "-2 does not fit --draft-tokens; accepted: 0 to 4294967295"),
    ],
)
def test_what_no_field_holds_is_refused_by_its_option(name: str, value: Any, said: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        request_spec.spec(None, **{name: value})
    assert refused.value.message.startswith(said)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 QiB", "1e9", "1.MiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        values.size(text)


def test_serve_has_an_option_for_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[ServerConfig] = []
    monkeypatch.setattr("lorry.server.app.run", lambda config: built.append(config) or 0)
    assert runner.invoke(app, ["serve"]).exit_code == 0
    assert built.pop() == ServerConfig()
    names = {field.name for cls in (ServerConfig, EngineConfig) for field in dataclasses.fields(cls)}
    assert {parameter.name for parameter in config_options.parameters()} == names - {"engine"}
    arguments = (
        "serve --model m --adapters d --adapter-root x --adapter-root y --kv-memory 3MiB --adapter-memory 5MiB "
        "--adapter-source hf://org --speculation prompt-lookup --draft-model s --draft-tokens 5 "
        "--metrics-port 0 --threads 2 --dtype bfloat16 --log-format json --drain-timeout 1.5"
    )
    assert runner.invoke(app, arguments.split()).exit_code == 0
    engine = EngineConfig(
        model="m",
        adapters_dir="d",
        adapter_roots=("x", "y"),
        adapter_sources=("hf://org",),
        kv_memory=3 << 20,
        adapter_memory=5 << 20,
        threads=2,
        dtype="bfloat16",
        speculation="prompt-lookup",
        draft_model="s",
        draft_tokens=5,
    )
    assert built.pop() == ServerConfig(engine=engine, metrics_port=0, log_format="json", drain_timeout=1.5)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--draft-tokens 0", "--draft-tokens"),
        ("--draft-tokens 33", "--draft-tokens"),
        ("--draft-model=", "--draft-model"),
        ("--speculation draft-model", "--speculation"),
        ("--speculation ngram", "--speculation"),
    ],
)
def test_serve_refuses_speculation_that_cannot_be(words: str, option: str) -> None:
    done = runner.invoke(app, ["serve", *words.split()])
    assert done.exit_code == 2 and option in done.output


def test_the_engine_is_told_of_speculation_and_checks_it() -> None:
    config = EngineConfig(speculation="draft-model", draft_model="small", draft_tokens=32)
    assert engine_config_from_json(to_json(config)) == config
    with pytest.raises(errors.InvalidField, match="draft_tokens is 33, 1 to 32"):
        engine_config_from_json(b'{"draft_tokens": 33}')
    with pytest.raises(errors.InvalidField, match="draft_model names none"):
        engine_config_from_json(b'{"speculation": "draft-model"}')


def test_serve_refuses_a_wrong_source() -> None:
    done = runner.invoke(app, ["serve", "--adapter-source", "http://example.org"])
    assert done.exit_code == 2 and "scheme" in done.output


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("serve", "generate", "score")), ["--version"]]
)
def test_start_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from lorry.server.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'grpc', 'numpy', 'zmq', 'google.protobuf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if arguments == ["--version"]:
        assert done.stdout == f"lorry {lorry.__version__}\n"
