"""The steps of the warm-up: what they are, and that they have everything compiled that serving launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lorry.adapters.device.pool import PagePool
from lorry.server.cache.blocks import BLOCK_SIZE
from lorry.server.decoding.sampling import Sampling
from lorry.server.engine.scheduler import Limits
from lorry.server.engine.start.memory import CudaMemory
from lorry.server.engine.start.rehearsal import Rehearsal
from lorry.server.engine.start.warm_up import Shape, decode_step, inputs_of, largest_step, most_rows, warm_up_shapes
from lorry.server.model.decoder import Decoder

LIMITS = [
    Limits(*numbers)
    for numbers in ((1, 1, 1), (5, 40, 300), (64, 2048, 131072), (70, 600, 33), (256, 64, 9), (3, 7, 1))
]


@pytest.mark.parametrize("limits", LIMITS)
def test_steps_are_within_the_limits_and_reach_them(limits: Limits) -> None:
    shapes = warm_up_shapes(limits)
    largest = largest_step(limits, 8, 128)
    for shape in (*shapes, largest):
        assert 1 <= len(shape.lengths) <= limits.max_running
        assert all(1 <= length <= limits.context_length for length in shape.lengths)
    powers = {1 << n for n in range(20) if 1 << n <= most_rows(limits)}
    for adapters in (0, 1):
        assert {shape.rows for shape in shapes if shape.adapters == adapters} >= powers | {most_rows(limits)}
    assert max(len(shape.lengths) for shape in shapes) == limits.max_running == len(largest.lengths)
    assert max(max(shape.lengths) for shape in shapes) == min(limits.context_length, most_rows(limits))
    assert largest.rows == most_rows(limits) and len(set(shapes)) == len(shapes)


def test_a_step_may_exceed_the_budget_by_a_block() -> None:
    assert most_rows(Limits(100, 64, 1000)) == 99 + BLOCK_SIZE
    assert most_rows(Limits(100, 640, 1000)) == 640
    assert most_rows(Limits(2, 640, 3)) == 6


def test_the_tensors_of_a_step() -> None:
    inputs = inputs_of(Shape((3, 1, 17), adapters=2, pages=5), 4, torch.device("cpu"))
    assert inputs.positions.tolist() == [0, 1, 2, 0, *range(17)]
    assert inputs.cu_seqlens_q.tolist() == [0, 3, 4, 21] and inputs.kv_lens.tolist() == [3, 1, 17]
    assert inputs.block_tables.shape == (3, 4) and inputs.max_query_len == 17
    assert inputs.slot_mapping.eq(-1).all() and inputs.segments is not None
    assert inputs.segments.starts.tolist() == [0, 3, 4, 21] and inputs.segments.page_bound == 5
    assert inputs.segments.slots.tolist() == [[-1, -1]] * 3
    assert inputs_of(decode_step(4, 0, 0), 1, torch.device("cpu")).segments is None
    cut = inputs_of(Shape((3, 1, 17), adapters=1, pages=1, cut=True), 4, torch.device("cpu")).segments
    assert cut is not None and cut.starts.tolist() == [0, 1, 3, 4, 12, 21] and cut.starts.dtype == torch.int32
    assert cut.slots.shape == (5, 1)


def rehearsal(decoder: Decoder, limits: Limits) -> Rehearsal:
    pool = PagePool(decoder.layout, 1 << 20)
    return Rehearsal(
        decoder, pool.pages, Sampling(), limits, torch.float32, adapters=8, pages=128, graph_pages=16, logits_rows=3
    )


def test_it_runs_and_adapters_that_are_not_there_change_nothing(decoder: Decoder) -> None:
    played = rehearsal(decoder, Limits(4, 20, 300))
    alone = played.forward(Shape((6, 1)))
    assert torch.equal(alone, played.forward(Shape((6, 1), adapters=1, pages=1)))
    assert alone.shape == (4, decoder.config.vocab_size) and alone.isfinite().all()
    told: list[int] = []
    played.warm_up(told.append)
    assert told == list(range(played.steps + 1)) and played.steps == len(warm_up_shapes(Limits(4, 20, 300)))


def test_two_of_the_largest_steps_are_measured(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(4, 20, 300)
    played = rehearsal(decoder, limits)
    run: list[Shape] = []

    class Memory(CudaMemory):
        def peak(self, run_it: Any) -> int:
            before = len(run)
            run_it()
            return len(run) - before

    forward = played.forward
    monkeypatch.setattr(played, "forward", lambda shape: (run.append(shape), forward(shape))[1])
    peaks = played.measure(Memory(torch.device("cpu")))
    assert (peaks.step, peaks.decode) == (2, 1)
    assert run == [largest_step(limits, 8, 128)] * 2 + [decode_step(4, 8, 16)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    shape = {
        "vocab_size": 200,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 1,
    }
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder / "model")
    hidden = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    script, cache, output = Path(__file__).parent / "compile_keys.py", folder / "cache", folder / "keys.json"
    command = [sys.executable, script, folder / "model", cache, output]
    subprocess.run(command, env=environment, check=True, timeout=600)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("place", range(3))
def test_serving_launches_nothing_that_the_warm_up_did_not(compiled: dict[str, Any], place: int) -> None:
    warm, serving = (
        {(kernel, key) for kernel, key in compiled["keys"][place][name]} for name in ("warm-up", "serving")
    )
    assert not serving - warm
    assert len(serving) > 0.9 * len(warm), "the test's steps, or the warm-up's, are not those of serving"
    expected = {"nf4_linear_kernel", "fill_routes_kernel", "qkv_finish_kernel", "decode_kernel", "rms_norm_kernel"}
    assert expected <= {kernel for kernel, _ in warm}
    assert len(warm) < 80, Counter(kernel for kernel, _ in warm)


def test_compilations_are_kept_and_late_ones_reported(compiled: dict[str, Any]) -> None:
    kept = compiled["kept"]
    assert kept["files"][0] == kept["files"][1] > 10
    assert kept["told"] == [[0, 2], [1, 2], [2, 2]] * 2
    assert kept["again"] == [] and kept["late"] == ["silu_mul_kernel"] * 2
