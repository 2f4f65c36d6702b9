"""What the warm-up has Triton compile, and what steps of serving would, for a GPU that need not be there.

    python compile_keys.py MODEL_FOLDER CACHE_FOLDER OUTPUT.json

A stand-in for Triton's driver says "sm_90"; tensors are in host memory, where they are as well aligned; kernels are
noted instead of launched. A process of its own, since Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from lorry.adapters.device.pool import PagePool
from lorry.kernels import dispatch
from lorry.kernels.lora import AdapterPages, Segments
from lorry.kernels.triton.compilations import Compilation, compile_noted, keep_in, noted, report_late
from lorry.kernels.triton.nf4_fragments import Fragments
from lorry.kernels.triton.silu_mul import silu_mul, silu_mul_kernel
from lorry.server.cache import kv_cache
from lorry.server.cache.blocks import blocks_for
from lorry.server.config import MIB
from lorry.server.decoding.interface import Row
from lorry.server.decoding.sampling import Sampling
from lorry.server.engine.graphs import all_buckets, idle_step, padded
from lorry.server.engine.scheduler import Limits
from lorry.server.engine.staging import upload
from lorry.server.engine.start.rehearsal import Rehearsal
from lorry.server.engine.start.warm_up import most_rows
from lorry.server.model.decoder import Decoder
from lorry.server.model.inputs import ModelInputs
from lorry.server.model.load import load_model
from lorry.server.params import SamplingParams, StoppingParams

BATCHES = 40
TARGET = GPUTarget("cuda", 90, 32)
LIMITS = (Limits(5, 40, 300), Limits(64, 700, 300), Limits(70, 1100, 4096))

Keys = list[tuple[str, str]]


def caches(blocks: int, heads: int, size: int, width: int, dtype: torch.dtype, device: object) -> Any:
    return tuple(torch.zeros(blocks, heads, size, width, dtype=dtype) for _ in range(2))


def random_step(limits: Limits, draw: random.Random) -> ModelInputs:
    """A step that the scheduler could plan: mixes of decoding and prompts, some with adapters."""
    left, lengths = min(most_rows(limits), int(2 ** draw.uniform(0, 12))), list[int]()
    for _ in range(draw.randint(1, limits.max_running)):
        share = 1 if draw.random() < 0.7 else draw.choice((2, 3, 5, 17, 40, 64, 65, 300, 511, 512, 513, 2048))
        lengths.append(min(share, limits.context_length, left))
        left -= lengths[-1]
        if left == 0:
            break
    ends = [draw.randint(length, limits.context_length) for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    segments = None
    if draw.random() < 0.6:
        bounds = {0, sum(lengths), *draw.sample(starts.tolist(), draw.randint(0, len(lengths)))}
        if draw.random() < 0.5:  # adapters that begin to act within a prompt
            within = [int(end) - draw.randrange(length) for end, length in zip(starts[1:], lengths, strict=True)]
            bounds |= set(draw.sample(within, draw.randint(0, len(within))))
        bounds = sorted(bounds)
        combos = (len(bounds) - 1, draw.randint(1, 8))
        segments = Segments(
            torch.tensor(bounds, dtype=torch.int32),
            torch.zeros(combos).int(),
            torch.ones(combos),
            draw.choice((1, 2, 3, 4, 16, 17, 64, 128)),
        )
    logits_segments = None
    if segments is not None and draw.random() < 0.7:  # of adapters that change the embedding or the head
        count, adapters = segments.slots.shape
        cuts = sorted(draw.choices(range(len(lengths) + 1), k=draw.choice((0, count - 1))))
        combos = (len(cuts) + 1, adapters)
        rows = torch.tensor([0, *cuts, len(lengths)], dtype=torch.int32)
        logits_segments = Segments(rows, torch.zeros(combos).int(), torch.ones(combos), draw.choice((1, 3, 16, 64)))
    return ModelInputs(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.cat([torch.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]),
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
        cu_seqlens_q=starts,
        kv_lens=torch.tensor(ends, dtype=torch.int32),
        block_tables=torch.zeros(len(lengths), blocks_for(max(ends)), dtype=torch.int32),
        segments=segments,
        logits_rows=starts[1:].long() - 1,
        max_query_len=max(lengths),
        logits_segments=logits_segments,
    )


def steps_of(limits: Limits, draw: random.Random) -> Iterator[ModelInputs]:
    """Some of serving, then all that are recorded as graphs, as they come to the device."""
    device = torch.device("cpu")
    for _ in range(BATCHES):
        yield upload(random_step(limits, draw), device)
    for bucket in all_buckets(limits.max_running, blocks_for(limits.context_length)):
        yield upload(padded(idle_step(), bucket), device)


def of_warm_up(decoder: Decoder, tables: AdapterPages, limits: Limits) -> dict[tuple[str, str], Compilation]:
    rehearsal = Rehearsal(
        decoder, tables, Sampling(), limits, torch.bfloat16, adapters=8, pages=128, graph_pages=16, logits_rows=64
    )
    with noted() as wanted:
        rehearsal.launch_all()
    return wanted


def of_serving(decoder: Decoder, tables: AdapterPages, limits: Limits, draw: random.Random) -> Keys:
    model = decoder.config
    kv = kv_cache.KVCache(model.layers, model.kv_heads, model.head_dim, 7, torch.bfloat16)
    with noted() as wanted:
        for inputs in steps_of(limits, draw):
            hidden = decoder.forward(inputs, kv, tables).index_select(0, inputs.logits_rows)
            logits = decoder.logits(hidden, None, inputs.logits_segments, tables)
            choose(logits[: limits.max_running], draw)
    return list(wanted)


def choose(logits: torch.Tensor, draw: random.Random) -> None:
    """The next tokens of rows of all kinds; none wants log-probabilities, since no token is chosen."""
    strategy = Sampling()
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(seed=2**63 + 1),
        SamplingParams(top_k=5, min_p=0.1),
        SamplingParams(top_p=0.5, frequency_penalty=0.5),
        SamplingParams(logit_bias={3: -1.0, 7: 2.0}),
        SamplingParams(repetition_penalty=1.2, no_repeat_ngram_size=3),
    )
    some = draw.sample(kinds, draw.randint(1, len(kinds)))
    tokens = [[draw.randrange(200) for _ in range(draw.randint(1, 40))] for _ in logits]
    rows = [
        Row(number, number, 0, prompt, prompt[: draw.randint(0, 9)], draw.choice(some), StoppingParams(99, 3))
        for number, prompt in enumerate(tokens)
    ]
    if all(map(strategy.can_begin, rows)):
        strategy.begin(rows, logits, [draw.randint(0, 1) for _ in rows], torch.zeros(len(rows), dtype=torch.int64))
    else:
        strategy.decide(rows, logits)


def kept(folder: Path) -> dict[str, Any]:
    """Compile two kernels, and once more as if after a new start: the files there are after each, what the progress
    was, what is wanted then, and what is reported as late when they are compiled again."""

    def launch() -> None:
        for rows in (1, 2):
            silu_mul(torch.empty(rows, 64))

    files, told, late = [], list[tuple[int, int]](), list[str]()
    keep_in(folder)
    for _ in range(2):
        silu_mul_kernel.device_caches.clear()
        with noted() as wanted:
            launch()
        compile_noted(wanted, 2, lambda done, total: told.append((done, total)))
        files.append(len(list(folder.rglob("*"))))
    with noted() as again:  # nor is launched what is compiled, which without a driver would fail
        launch()
    report_late(late.append)
    silu_mul_kernel.device_caches.clear()
    for compilation in wanted.values():
        compilation.compile()
    return {"files": files, "told": told, "again": list(again), "late": late}


@torch.inference_mode()
def main(model: str, cache: str, output: str) -> None:
    driver = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(driver)
    on_device = classmethod(lambda cls, parts, bias: cls(parts, bias))
    found = []
    with (
        patch.object(dispatch, "on_gpu", lambda x: True),
        patch.object(Fragments, "on_device", on_device),
        patch.object(kv_cache, "empty_caches", caches),
    ):
        decoder = load_model(model, dtype=torch.bfloat16)
        tables = PagePool(decoder.layout, 4 * MIB).pages
        for number, limits in enumerate(LIMITS):
            wanted = of_warm_up(decoder, tables, limits)
            serving = of_serving(decoder, tables, limits, random.Random(number))
            found.append({"warm-up": list(wanted), "serving": serving})
    results = {"keys": found, "kept": kept(Path(cache))}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
