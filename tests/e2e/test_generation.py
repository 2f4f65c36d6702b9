"""Generation end to end: a real channel, the frontend, the engine's own process, a tiny random model.

The model's weights are random, so what it says means nothing; what is tested is that every field does what its
sentence in the contract says, and that nothing is left behind.
"""

from __future__ import annotations

import runpy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import text_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lorry.v1 import control_pb2 as ct
from lorry.v1 import control_pb2_grpc, generation_pb2_grpc
from lorry.v1 import generation_pb2 as gn

VOCAB = 331
PROMPTS = ["The ferry", "Grüße aus", "nobody waits for", "A", "crème", "over the lazy dog, then", "5 €", "東京"]
refused = runpy.run_path(str(Path(__file__).parents[1] / "rpc" / "refused_specs.py"))["refused"]


@pytest.fixture(scope="module")
def stub(tiny_server: Any) -> Any:
    return tiny_server.stub(generation_pb2_grpc.GenerationServiceStub)


@pytest.fixture(scope="module")
def control(tiny_server: Any) -> Any:
    return tiny_server.stub(control_pb2_grpc.ControlServiceStub)


@pytest.fixture(autouse=True)
def nothing_is_left(control: Any) -> Iterator[None]:
    """After each test nothing runs, nothing waits; blocks that only the prefix index holds are free to take."""
    yield
    limit = time.monotonic() + 60
    while True:
        load = control.GetLoad(ct.GetLoadRequest())
        if load.running == load.waiting == load.kv_blocks_used == 0:
            return
        assert time.monotonic() < limit, f"left behind: {load}"
        time.sleep(0.02)


def make(text: str = "", prompt: str | None = "The ferry leaves") -> gn.GenerationSpec:
    """A spec in text format; greedy, and short, unless it says otherwise."""
    spec = text_format.Parse(text, gn.GenerationSpec())
    if spec.WhichOneof("prompt") is None and prompt is not None:
        spec.text = prompt
    if not spec.sampling.HasField("temperature"):
        spec.sampling.temperature = 0
    if not spec.stopping.HasField("max_new_tokens"):
        spec.stopping.max_new_tokens = 24
    return spec


def generate(stub: Any, text: str = "", prompt: str | None = "The ferry leaves", **kwargs: Any) -> Any:
    return stub.Generate(gn.GenerateRequest(spec=make(text, prompt)), timeout=60, **kwargs)


def stream(stub: Any, text: str = "", prompt: str = "The ferry leaves", timeout: float = 60) -> Any:
    return stub.GenerateStream(gn.GenerateStreamRequest(spec=make(text, prompt)), timeout=timeout)


MOST = 2000
LONG = f"stopping {{ max_new_tokens: {MOST} ignore_eos: true }}"  # goes on while the next calls are made


def details_of(error: Any) -> dict[str, Any]:
    found = {}
    for packed in rpc_status.from_call(error).details:
        name = packed.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        packed.Unpack(found[name])
    return found


def test_the_stream_is_the_answer(stub: Any) -> None:
    some = "stopping { max_new_tokens: 400 ignore_eos: true }"
    whole = generate(stub, some).completions[0]
    assert len(whole.token_ids) == 400
    events = list(stream(stub, some))
    assert events[0].WhichOneof("event") == "started"
    assert [event.WhichOneof("event") for event in events[1:-1]] == ["delta"] * (len(events) - 2)
    finished = events[-1].finished
    assert (finished.reason, finished.usage.completion_tokens) == (gn.FINISH_REASON_LENGTH, 400)
    deltas = [event.delta for event in events[1:-1]]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [id for delta in deltas for id in delta.token_ids] == list(whole.token_ids)
    assert len(deltas) > 6
    assert finished.timings.decode.ToNanoseconds() > 0
    assert stub.Detokenize(gn.DetokenizeRequest(token_ids=whole.token_ids)).text == whole.text


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_in_three_forms(stub: Any, prompt: str) -> None:
    """Text is its tokens with the special ones; a conversation is its template's text without more of them."""
    ids = list(stub.Tokenize(gn.TokenizeRequest(text=prompt)).token_ids)
    plain = list(stub.Tokenize(gn.TokenizeRequest(text=prompt, add_special_tokens=False)).token_ids)
    assert ids == [0, *plain]
    assert stub.Detokenize(gn.DetokenizeRequest(token_ids=ids)).text == prompt
    shown = stub.Detokenize(gn.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)).text
    assert shown == "<|bos|>" + prompt
    text = generate(stub, prompt=prompt)
    assert text.usage.prompt_tokens == len(ids)
    by_ids = generate(stub, f"token_ids {{ ids: {ids} }}")
    assert by_ids.completions[0].token_ids == text.completions[0].token_ids
    chat = gn.ChatPrompt(messages=[gn.ChatMessage(role="user", content=prompt)])
    chat_ids = list(stub.Tokenize(gn.TokenizeRequest(chat=chat)).token_ids)
    assert chat_ids == [3, *plain, 1, 4]
    spec = make(prompt=None)
    spec.chat.CopyFrom(chat)
    by_chat = stub.Generate(gn.GenerateRequest(spec=spec))
    by_ids = generate(stub, f"token_ids {{ ids: {chat_ids} }}")
    assert by_chat.completions[0].token_ids == by_ids.completions[0].token_ids


def test_text_is_whole_characters(stub: Any) -> None:
    """The random model writes stray bytes; no delta ends within a character, and all of them give the text."""
    for seed in range(6):
        spec = f"sampling {{ temperature: 1.5 seed: {seed} }} stopping {{ max_new_tokens: 60 }}"
        whole = generate(stub, spec).completions[0]
        pieces = [event.delta.text for event in stream(stub, spec) if event.HasField("delta")]
        assert "".join(pieces) == whole.text
        assert stub.Detokenize(gn.DetokenizeRequest(token_ids=whole.token_ids)).text == whole.text


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_does_not_see_its_batch(stub: Any, temperature: float) -> None:
    specs = [
        make(f"sampling {{ temperature: {temperature} seed: {40 + at} top_k: 50 top_p: 0.95 }}", prompt)
        for at, prompt in enumerate(PROMPTS)
    ]
    alone = [stub.Generate(gn.GenerateRequest(spec=spec)).completions[0].token_ids for spec in specs]
    calls = [stub.Generate.future(gn.GenerateRequest(spec=spec)) for spec in specs * 2]
    assert [call.result().completions[0].token_ids for call in calls] == alone * 2


def test_seeds(stub: Any) -> None:
    def ids(seed: str) -> list[int]:
        return list(generate(stub, f"sampling {{ temperature: 1 {seed} }}").completions[0].token_ids)

    assert ids("seed: 7") == ids("seed: 7")
    assert ids("seed: 7") != ids("seed: 8")
    assert ids("seed: 7") != ids(f"seed: {2**63 + 7}")
    assert ids("") != ids("")


def test_n_sequences_share_a_prompt(stub: Any) -> None:
    answer = generate(stub, "sampling { n: 3 temperature: 1 seed: 5 }")
    assert [completion.index for completion in answer.completions] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in answer.completions}) == 3
    assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in answer.completions)
    again = generate(stub, "sampling { n: 3 temperature: 1 seed: 5 }")
    assert [c.token_ids for c in again.completions] == [c.token_ids for c in answer.completions]
    finished = [event.finished.index for event in stream(stub, "sampling { n: 3 temperature: 1 }")]
    assert set(finished) == {0, 1, 2}


def test_searches_answer_at_the_end_with_scores(stub: Any) -> None:
    """Beams as a stream and whole, best first; best of n keeps what sampling the same seeds gives."""
    wish = "beam { width: 4 groups: 2 diversity_penalty: 0.5 } sampling { n: 3 } stopping { max_new_tokens: 9 }"
    spec = text_format.Parse(wish, gn.GenerationSpec(text="The ferry leaves"))
    whole = stub.Generate(gn.GenerateRequest(spec=spec))
    scores = [completion.score for completion in whole.completions]
    assert [completion.index for completion in whole.completions] == [0, 1, 2]
    assert all(completion.HasField("score") for completion in whole.completions)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    events = list(stub.GenerateStream(gn.GenerateStreamRequest(spec=spec)))
    assert [event.finished.score for event in events if event.HasField("finished")] == scores
    assert [event.delta.text for event in events if event.HasField("delta")] == [c.text for c in whole.completions]

    contrastive = text_format.Parse(
        "contrastive { top_k: 4 penalty_alpha: 0.6 } stopping { max_new_tokens: 7 }", gn.GenerationSpec(text="A")
    )
    answer = stub.Generate(gn.GenerateRequest(spec=contrastive))
    assert len(answer.completions[0].token_ids) == 7 and not answer.completions[0].HasField("score")
    assert sum(e.HasField("delta") for e in stub.GenerateStream(gn.GenerateStreamRequest(spec=contrastive))) > 1

    told = []
    for dola in ("", "dola { layers: [0, 2] }"):
        wish = f"{dola} stopping {{ max_new_tokens: 9 }} sampling {{ temperature: 1 seed: 7 repetition_penalty: 1.2"
        sampled = make(f"{wish} n: 6 }} response {{ logprobs: 0 }}")
        candidates = stub.Generate(gn.GenerateRequest(spec=sampled)).completions
        for ranking, divided in (("MEAN", True), ("SUM", False)):
            ranked = sorted(
                (
                    (sum(e.logprob for e in c.logprobs) / (len(c.token_ids) if divided else 1), c.text)
                    for c in candidates
                ),
                reverse=True,
            )
            best = make(f"{wish} n: 2 }}")
            best.best_of.candidates, best.best_of.ranking = 6, gn.BestOfRanking.Value(f"BEST_OF_RANKING_{ranking}")
            found = stub.Generate(gn.GenerateRequest(spec=best)).completions
            assert [completion.text for completion in found] == [text for _, text in ranked[:2]]
            assert [c.score for c in found] == pytest.approx([score for score, _ in ranked[:2]], rel=1e-5)
            assert [c.index for c in found] == [0, 1] and not any(c.logprobs for c in found)
        told.append({completion.text for completion in candidates})
    assert told[0] != told[1]


def test_filters_leave_the_most_likely_token(stub: Any) -> None:
    greedy = generate(stub).completions[0].token_ids
    for one in ("top_k: 1", "top_p: 0.000001", "min_p: 1"):
        assert generate(stub, f"sampling {{ temperature: 1 {one} }}").completions[0].token_ids == greedy


def test_logit_bias_and_penalties(stub: Any) -> None:
    ids = list(generate(stub, "sampling { logit_bias { key: 77 value: 100 } }").completions[0].token_ids)
    assert ids == [77] * 24
    greedy = generate(stub).completions[0].token_ids[0]
    banned = generate(stub, f"sampling {{ logit_bias {{ key: {greedy} value: -100 }} }}").completions[0]
    assert greedy not in banned.token_ids
    bias = "logit_bias { key: 77 value: 50 } logit_bias { key: 78 value: 49 }"
    for penalty in ("presence_penalty: 2", "frequency_penalty: 2", "repetition_penalty: 2"):
        ids = list(generate(stub, f"sampling {{ {bias} {penalty} }}").completions[0].token_ids)
        assert ids[:2] == [77, 78], penalty


def middle(stub: Any) -> tuple[str, str]:
    """A greedy answer, and a piece of it that begins and ends within tokens and appears for the first time."""
    whole = generate(stub).completions[0]
    text = whole.text
    for start in range(len(text) // 3, len(text) - 4):
        piece = text[start : start + 4]
        if text.index(piece) == start and "\ufffd" not in piece:
            return text, piece
    raise AssertionError("the answer repeats itself all the time")


def test_stop_strings(stub: Any) -> None:
    text, piece = middle(stub)
    quoted = text_format.text_encoding.CEscape(piece.encode(), as_utf8=True)
    stops = f'stopping {{ stop: "never there" stop: "{quoted}" }}'
    answer = generate(stub, stops).completions[0]
    assert (answer.reason, answer.stop) == (gn.FINISH_REASON_STOP, piece)
    assert answer.text == text[: text.index(piece)]
    kept = generate(stub, stops + " response { include_stop: true }").completions[0]
    assert kept.text == answer.text + piece
    events = list(stream(stub, stops))
    shown = ""
    for event in events:
        shown += event.delta.text
        assert answer.text.startswith(shown), "a part of the stop string was shown"
    assert shown == answer.text
    assert events[-1].finished.stop == piece


def test_stop_tokens_and_least_tokens(stub: Any) -> None:
    ids = list(generate(stub).completions[0].token_ids)
    token = next(token for at, token in enumerate(ids) if at > 4)
    first = ids.index(token)
    answer = generate(stub, f"stopping {{ stop_token_ids: {token} }}").completions[0]
    assert (answer.reason, answer.stop) == (gn.FINISH_REASON_STOP, "")
    assert list(answer.token_ids) == ids[: first + 1]
    bias = f"sampling {{ logit_bias {{ key: {token} value: 100 }} }}"
    for least in (0, 1, 2, 9):
        spec = f"{bias} stopping {{ stop_token_ids: {token} min_new_tokens: {least} }}"
        answer = generate(stub, spec).completions[0]
        assert (answer.reason, len(answer.token_ids)) == (gn.FINISH_REASON_STOP, least + 1)


def test_end_of_sequence(stub: Any) -> None:
    bias = "sampling { logit_bias { key: 1 value: 100 } }"
    answer = generate(stub, bias).completions[0]
    assert (answer.reason, list(answer.token_ids), answer.text) == (gn.FINISH_REASON_EOS, [1], "")
    on = generate(stub, bias + " stopping { ignore_eos: true }").completions[0]
    assert (on.reason, len(on.token_ids)) == (gn.FINISH_REASON_LENGTH, 24)
    assert len(generate(stub, bias + " stopping { min_new_tokens: 5 }").completions[0].token_ids) == 6


def test_the_context_ends_an_answer(stub: Any, control: Any) -> None:
    context = control.GetModelInfo(ct.GetModelInfoRequest()).context_length
    spec = make("stopping { ignore_eos: true }")
    spec.stopping.ClearField("max_new_tokens")
    answer = stub.Generate(gn.GenerateRequest(spec=spec))
    assert answer.completions[0].reason == gn.FINISH_REASON_LENGTH
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == context
    for ids, most in (([9] * context, 1), ([9] * 7, context - 6)):
        spec = make(f"token_ids {{ ids: {ids} }} stopping {{ max_new_tokens: {most} }}")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(gn.GenerateRequest(spec=spec))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        metadata = details_of(caught.value)["ErrorInfo"].metadata
        assert (metadata["prompt_tokens"], metadata["context_length"]) == (str(len(ids)), str(context))
    fits = make(f"token_ids {{ ids: {[9] * (context - 1)} }} stopping {{ max_new_tokens: 1 }}")
    assert len(stub.Generate(gn.GenerateRequest(spec=fits)).completions[0].token_ids) == 1


def test_logprobs_agree_with_score(stub: Any) -> None:
    answer = generate(stub, "response { logprobs: 3 prompt_logprobs: true entropy: true }")
    completion = answer.completions[0]
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    for entry in completion.logprobs:
        assert entry.rank == 1
        assert entry.top[0].token_id == entry.token_id
        assert entry.top[0].logprob == pytest.approx(entry.logprob, abs=1e-6)
        assert [rival.logprob for rival in entry.top] == sorted((r.logprob for r in entry.top), reverse=True)
        assert len(entry.top) == 3
        assert entry.logprob <= 0
    continuation = gn.TokenIds(ids=completion.token_ids)
    score = stub.Score(gn.ScoreRequest(text="The ferry leaves", continuation=continuation, entropy=True))
    assert list(score.greedy_token_ids) == list(completion.token_ids)
    assert list(score.logprobs) == pytest.approx([e.logprob for e in completion.logprobs], abs=1e-3)
    assert list(score.entropies) == pytest.approx([e.entropy for e in completion.logprobs], abs=1e-3)
    ids = list(stub.Tokenize(gn.TokenizeRequest(text="The ferry leaves")).token_ids)
    assert [entry.token_id for entry in answer.prompt_logprobs] == ids[1:]
    score = stub.Score(gn.ScoreRequest(token_ids=gn.TokenIds(ids=ids[:1]), continuation=gn.TokenIds(ids=ids[1:])))
    assert list(score.logprobs) == pytest.approx([e.logprob for e in answer.prompt_logprobs], abs=1e-3)
    sampled = generate(stub, "sampling { temperature: 2 seed: 3 } response { logprobs: 0 }").completions[0]
    assert all(len(entry.top) == 0 for entry in sampled.logprobs)
    assert any(entry.rank > 1 for entry in sampled.logprobs)


def test_include_prompt(stub: Any) -> None:
    plain = generate(stub).completions[0].text
    assert generate(stub, "response { include_prompt: true }").completions[0].text == "The ferry leaves" + plain


def test_time_limit_is_soft(stub: Any) -> None:
    answer = generate(stub, LONG[:-1] + " time_limit { nanos: 60000000 } }").completions[0]
    assert answer.reason == gn.FINISH_REASON_TIME_LIMIT
    assert len(answer.token_ids) < MOST


@pytest.mark.parametrize("phase", ["at once", "started", "first token", "mid stream", "unary"])
def test_cancel(stub: Any, phase: str) -> None:
    """The client leaves; `nothing_is_left` sees that everything of the request goes."""
    if phase == "unary":
        future = stub.Generate.future(gn.GenerateRequest(spec=make(LONG)))
        time.sleep(0.1)
        future.cancel()
        return
    call = stream(stub, LONG)
    if phase != "at once":
        assert next(call).HasField("started")
    tokens = 0
    while tokens < {"first token": 1, "mid stream": 20}.get(phase, 0):
        tokens += len(next(call).delta.token_ids)
    call.cancel()


def test_cancel_while_waiting_for_a_place(stub: Any, control: Any) -> None:
    """More sequences than may run: those that wait are cancelled, those that run end by themselves."""
    most = control.GetLoad(ct.GetLoadRequest()).max_running
    text = "sampling { temperature: 1 n: 16 } stopping { max_new_tokens: 30 ignore_eos: true }"
    running = [stream(stub, text) for _ in range(most // 16)]
    for call in running:
        next(call)
    waiting = [stream(stub, text) for _ in range(4)]
    time.sleep(0.05)
    for call in waiting:
        call.cancel()
    for call in running:
        reasons = [event.finished.reason for event in call if event.HasField("finished")]
        assert reasons == [gn.FINISH_REASON_LENGTH] * 16


def test_deadlines(stub: Any) -> None:
    for timeout, text in ((0.05, LONG), (0.001, "")):
        with pytest.raises(grpc.RpcError) as caught:
            list(stream(stub, text, timeout=timeout))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_abort_ends_with_what_is_there(stub: Any, control: Any) -> None:
    call = stream(stub, 'request_id: "to-abort" ' + LONG)
    assert next(call).started.request_id == "to-abort"
    next(call)
    assert control.AbortRequest(ct.AbortRequestRequest(request_id="to-abort")).found
    events = list(call)
    assert events[-1].finished.reason == gn.FINISH_REASON_ABORTED
    assert 0 < events[-1].finished.usage.completion_tokens < MOST
    assert not control.AbortRequest(ct.AbortRequestRequest(request_id="to-abort")).found


def test_a_request_id_is_taken_once(stub: Any) -> None:
    call = stream(stub, 'request_id: "twice" ' + LONG)
    next(call)
    with pytest.raises(grpc.RpcError) as caught:
        generate(stub, 'request_id: "twice"')
    assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert details_of(caught.value)["ResourceInfo"].resource_name == "twice"
    call.cancel()


def test_an_unknown_adapter_is_named(stub: Any) -> None:
    for call in (
        lambda: generate(stub, 'adapters { id: "nobody" }'),
        lambda: list(stream(stub, 'adapters { id: "nobody" }')),
        lambda: stub.Score(
            gn.ScoreRequest(text="x", continuation=gn.TokenIds(ids=[5]), adapters=[gn.AdapterRef(id="nobody")])
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert details_of(caught.value)["ResourceInfo"].resource_name == "nobody"


@pytest.mark.parametrize(("text", "path", "words"), refused(VOCAB))
def test_bad_input(stub: Any, text: str, path: str, words: str) -> None:
    spec = text_format.Parse(text, gn.GenerationSpec())
    if spec.WhichOneof("prompt") is None:
        spec.text = "hello"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(gn.GenerateRequest(spec=spec))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    violation = details_of(caught.value)["BadRequest"].field_violations[0]
    assert violation.field == path
    assert words in violation.description


def test_the_base_is_no_adapter(stub: Any, control: Any) -> None:
    name = control.GetModelInfo(ct.GetModelInfoRequest()).name
    with pytest.raises(grpc.RpcError) as caught:
        generate(stub, f'adapters {{ id: "{name}" }}')
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_model_info_is_measured(control: Any) -> None:
    info = control.GetModelInfo(ct.GetModelInfoRequest())
    assert (info.layers, info.hidden_size, info.vocab_size, info.context_length) == (3, 128, VOCAB, 2048)
    assert list(info.eos_token_ids) == [1]
    assert (info.dtype, info.kv_dtype, info.adapter_dtype, info.device) == (
        "float32",
        "float32",
        "bfloat16",
        "cpu",
    )
    assert 4 < info.bits_per_linear_weight <= 4.7
    assert info.block_size == 16
    assert info.kv_blocks > 100
    assert len(info.base_fingerprint) == 64


def test_many_at_once(stub: Any) -> None:
    """Four threads, each with streams that are cut, cancelled or finished; the survivors have the solo answer."""
    alone = {prompt: list(generate(stub, "", prompt).completions[0].token_ids) for prompt in PROMPTS}
    failures: list[str] = []

    def work(offset: int) -> None:
        for at in range(8):
            prompt = PROMPTS[(offset + at) % len(PROMPTS)]
            call = stream(stub, "", prompt)
            if (at + offset) % 3 == 0:
                next(call)
                call.cancel()
                continue
            ids = [id for event in call for id in event.delta.token_ids]
            if ids != alone[prompt]:
                failures.append(prompt)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
