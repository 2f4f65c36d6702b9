"""What bench/step.py does without a GPU: every case on a tiny model, what makes an answer wrong, bytes, goals."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from lorry.adapters import loader
from lorry.adapters.canonical import CanonicalAdapter
from lorry.server.engine.local import Answer, Completion
from lorry.server.params import TokenLogprob, TokenLogprobs

STEP = Path(__file__).parents[2] / "bench" / "step.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as left:
        importlib.import_module("step").main()
    assert left.value.exit_code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_a_dry_run_checks_and_writes(tmp_path: Path) -> None:
    output = tmp_path / "new" / "result.json"
    only = ["--only", "decode, 3", "--only", "products"]
    done = subprocess.run(
        [sys.executable, STEP, "--dry-run", *only, "--output", output],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["failures"] == result["left_out"] == {}
    ran = [(figure["op"], figure["shape"]) for figure in result["figures"]]
    mixes = ["no adapter", "1 adapter of rank 16", "2 adapters of rank 16", "2 adapters of ranks 8 to 40"]
    assert ran == [("decode", mix) for mix in mixes] + [("peer: bf16 products", "no adapter")] * 2
    assert all(figure["microseconds"] is None for figure in result["figures"])
    assert {goal["reached"] for goal in result["goals"]} == {"not yet measured"}
    assert set(result["versions"]) >= {"torch", "triton", "transformers", "peft"}


@pytest.fixture(scope="module")
def session(_importable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, sizes = tmp_path_factory.mktemp("step"), importlib.import_module("steps.sizes")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(sizes.TINY))
    stage = importlib.import_module("gpu.measure").Stage("cpu", dry=True)
    found = importlib.import_module("steps.session").Session(stage, sizes.sizes_of(stage, folder / "tiny"), folder)
    yield found
    found.close()


def test_a_session_that_fails_leaves_nothing_behind(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader is the one that was there, or every later test in this process would meet the random one."""
    sessions = importlib.import_module("steps.session")
    before = loader.load_adapter

    def broken(*_: object) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(sessions.Session, "_pin", broken)
    with pytest.raises(RuntimeError, match="no adapter"):
        sessions.Session(session.stage, session.sizes, tmp_path)
    assert loader.load_adapter == before


def test_the_other_cases(session: Any) -> None:
    modules = {name: importlib.import_module(f"steps.{name}") for name in ("bystanders", "prefill", "idle")}
    (figure,) = modules["bystanders"].bystanders(session)
    assert int(figure.plan.split()[0]) > 0
    assert [figure.rows for figure in modules["prefill"].prefill(session)] == [20, 20, 90, 90]
    assert [figure.shape for figure in modules["idle"].idle(session)] == [str(mix) for mix in session.sizes.mixes]
    session.engine.engine.adapters.check()
    assert session.engine.engine.scheduler.allocator.used == 3 * session.sizes.text_blocks, "blocks are left behind"


def test_wrong_answers_have_no_figures(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, wrong = importlib.import_module("steps.decode"), importlib.import_module("gpu.measure").Wrong
    graphs = session.runner.graphs
    replay = graphs.replay

    def swapped(inputs: Any, bucket: Any) -> Any:
        output = replay(inputs, bucket)
        return replace(output, logits=output.logits.flip(0))

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "replay", swapped)
        with pytest.raises(wrong, match="graphs against single launches"):
            list(decode.decode(session, 3))
    with monkeypatch.context() as patch:
        patch.setattr(session.runner, "graphs", None)
        with pytest.raises(wrong, match="no graph"):
            decode.steady(session, session.requests(3, lambda row: None, session.sizes.steps))
    arena = session.runner.pages.arena
    kept = arena.clone()
    with torch.inference_mode():
        arena.zero_()
    with pytest.raises(wrong, match="changes nothing"):
        list(decode.decode(session, 3))
    with torch.inference_mode():
        arena.copy_(kept)
    assert len(list(decode.decode(session, 3))) == 4


def test_a_prompt_is_found_but_for_its_last_token(session: Any) -> None:
    requests = session.requests(2, lambda row: f"00{row}-16", 3, steps=session.sizes.steps)
    session.engine.run(*requests)
    for request in requests:
        started = session.engine.answers[request.request_id].started
        assert started.cached_tokens == len(request.prompt_token_ids) - 1 == 48
    session.taken(requests)


def test_bytes_of_a_step(session: Any) -> None:
    mix = importlib.import_module("steps.sizes").Mix
    model = session.decoder.config
    linears = sum(n * k for n, k in model.linear_shapes().values()) * model.layers
    head, norms = model.vocab_size * model.hidden_size * 2, (2 * model.layers + 1) * model.hidden_size * 4
    weights = session.bytes_of(1, mix(0), 0)
    tables = 8000  # of the codes, once
    assert 0 < weights - head - norms - 0.515 * linears < tables
    token = 2 * model.layers * model.kv_heads * model.head_dim * 4
    assert session.bytes_of(3, mix(0), 10.5) - weights == pytest.approx(31.5 * token)
    page = 16 * sum(n + k for n, k in model.linear_shapes().values()) * model.layers * 4
    assert session.bytes_of(1, mix(2, (8, 40)), 0) - weights == 4 * page


def test_random_adapters(session: Any) -> None:
    make = session.adapters.make
    one: CanonicalAdapter = make("000-8", session.decoder.layout, torch.bfloat16)
    other: CanonicalAdapter = make("001-40", session.decoder.layout, torch.bfloat16)
    q = one.linears[0, "q_proj"].pages
    inputs, _ = session.decoder.layout.sites["q_proj"]
    a, b = q[0][: 16 * inputs].view(16, -1), q[0][16 * inputs :].view(16, -1)
    assert q.shape[0] == 1 and bool((a[:8] != 0).any()) and not a[8:].any() and not b[8:].any()
    assert other.linears[1, "down_proj"].pages.shape[0] == 3
    assert not torch.equal(other.linears[0, "q_proj"].pages, other.linears[1, "q_proj"].pages)


def test_sizes() -> None:
    sizes, session = importlib.import_module("steps.sizes"), importlib.import_module("steps.session")
    real = sizes.REAL
    assert (real.model / "config.json").is_file()
    assert len(real.adapters) == 64 + 48 and real.pages == 64 + 16 + 2 * 16 + 4 * 16
    assert [str(mix) for mix in real.mixes_of(16)] == ["no adapter", "1 adapter of rank 16", "8 adapters of rank 16"]
    assert [str(mix) for mix in real.mixes_of(256)][-1] == "64 adapters of ranks 8 to 64"
    assert [session.graph_pages(mix) for mix in real.mixes] == [0, 1, 1, 1, 4]
    assert real.without_largest().batches == (1, 16, 64)
    assert real.context - real.steps == 16 * real.text_blocks


def answer(*tokens: tuple[int, float], top: dict[int, float]) -> Answer:
    listed = tuple(TokenLogprob(token, value) for token, value in top.items())
    logprobs = [TokenLogprobs(token, value, 1, listed) for token, value in tokens]
    return Answer(completions={0: Completion([token for token, _ in tokens], logprobs)})


def test_answers_may_differ_where_tokens_are_as_likely() -> None:
    decode, wrong = importlib.import_module("steps.decode"), importlib.import_module("gpu.measure").Wrong
    top = {3: -1.0, 4: -1.1, 5: -2.0}
    ours = [answer((3, -1.0), (4, -1.1), top=top)]
    decode.compare("same", ours, ours)
    decode.compare("a near-tie ends the comparison", [answer((4, -1.05), (9, -8.0), top=top)], ours)
    for token, logprob in ((5, -2.0), (9, -1.0), (3, -1.5)):
        with pytest.raises(wrong, match=f"token 0 is {token}"):
            decode.compare("other", [answer((token, logprob), (4, -1.1), top=top)], ours)


def test_busy_time_is_what_spans_cover_together() -> None:
    union = importlib.import_module("steps.idle").union
    assert union([]) == 0
    assert union([(5, 6), (0, 2), (1, 3), (1.5, 1.7)]) == pytest.approx(4)


def test_goals_are_read_from_their_figures() -> None:
    goals = importlib.import_module("steps.goals").GOALS
    evaluate = importlib.import_module("gpu.goals").evaluate
    measure = importlib.import_module("gpu.measure")
    assert [goal["shown"] for goal in evaluate([], goals)] == ["not yet measured"] * 5
    copy = 1e12

    def row(op: str, shape: str, rows: int, seconds: float, nbytes: float = 0.0, **parts: float) -> Any:
        named = {name.replace("_", " "): value for name, value in parts.items()}
        return measure.Figure(op, shape, rows, seconds, nbytes, parts=named).report(measure.Limits(copy, copy))

    rows = [
        row("decode", "no adapter", 1, 1.5e-3, 1e9),
        row("decode", "8 adapters of rank 16", 64, 2.5e-3, 1e9),
        row("decode", "1 adapter of rank 16", 64, 1.02e-3, 1e9, without_adapters=1e-3),
        row("decode", "1 adapter of rank 16", 16, 9e-3, 1e9, without_adapters=1e-3),
        row("step apart", "no adapter", 16, 1e-3, busy=0.99e-3),
        row("step apart", "8 adapters of rank 16", 16, 1e-3, busy=0.95e-3),
        row("bystanders", "while adapters load", 16, 1.05e-3, quiet_p99=1e-3),
    ]
    found = evaluate(rows, goals)
    assert [goal["measured"] for goal in found] == pytest.approx([1.5, 2.5, 0.02, 0.05, 0.05])
    assert [goal["reached"] for goal in found] == ["floor", "below the floor", "aim", "floor", "floor"]
    assert evaluate(rows[:5], goals)[3]["reached"] == "not yet measured"


def test_peers(session: Any) -> None:
    peers, figure = importlib.import_module("steps.peers"), importlib.import_module("gpu.measure").Figure
    ours = figure("decode", "2 adapters of rank 16", 3, None, 0.0)
    rivals = peers.Rivals(session.stage, session.sizes, [ours])
    found = list(peers.hugging_face(rivals, four_bit=False, adapters=True))
    assert [(each.rows, each.shape) for each in found] == [
        (1, "1 adapter of rank 16"),
        (3, "1 adapter of rank 16"),
        (3, "2 adapters of rank 16"),
    ]
    assert list(ours.peers) == ["transformers + PEFT, bf16"]
