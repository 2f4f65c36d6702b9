"""What the warm-up has Triton compile, and what random steps of serving would: for a GPU that need not be there.

    python compile_keys.py MODEL_FOLDER OUTPUT.json [--compile FOLDER]

A stand-in for Triton's driver says "sm_90"; tensors are in host memory, where pointers are as well aligned; kernels are
noted instead of launched. Runs in a process of its own, since Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from lorry.adapters.pool import PagePool
from lorry.kernels import dispatch
from lorry.kernels.lora import Segments
from lorry.kernels.triton.compilations import noted
from lorry.kernels.triton.nf4_fragments import Fragments
from lorry.server.cache import kv_cache
from lorry.server.cache.blocks import blocks_for
from lorry.server.config import MIB
from lorry.server.decoding.sampling import Sampling
from lorry.server.engine.rehearsal import Rehearsal
from lorry.server.engine.scheduler import Limits
from lorry.server.engine.warm_up import most_rows
from lorry.server.model.inputs import ModelInputs
from lorry.server.model.load import load_model

BATCHES = 200
TARGET = GPUTarget("cuda", 90, 32)
LIMITS = (Limits(5, 40, 300), Limits(64, 700, 300), Limits(70, 1100, 4096))


def caches(blocks: int, heads: int, size: int, width: int, dtype: torch.dtype, device: object) -> Any:
    return tuple(torch.zeros(blocks, heads, size, width, dtype=dtype) for _ in range(2))


def random_step(limits: Limits, draw: random.Random) -> ModelInputs:
    """A step that the scheduler could plan: mixes of decoding and prompts, some with adapters."""
    left, lengths = most_rows(limits), list[int]()
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
        bounds = sorted({0, sum(lengths), *draw.sample(starts.tolist(), draw.randint(0, len(lengths)))})
        combos = (len(bounds) - 1, draw.randint(1, 8))
        pages = draw.choice((1, 2, 3, 4, 16, 17, 64, 128))
        segments = Segments(
            torch.tensor(bounds, dtype=torch.int32), torch.zeros(combos).int(), torch.ones(combos), pages
        )
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
    )


def keys(limits: Limits, folder: str, draw: random.Random) -> dict[str, list[list[str]]]:
    decoder = load_model(folder, dtype=torch.bfloat16)
    model = decoder.config
    pool = PagePool(decoder.layout, 4 * MIB, torch.bfloat16)
    rehearsal = Rehearsal(
        decoder, pool.pages, Sampling(), limits, torch.bfloat16, adapters=8, pages=128, graph_pages=16, logits_rows=64
    )
    found = {}
    with noted() as wanted:
        rehearsal.launch_all()
    found["warm-up"] = [list(key) for key in wanted]
    kv = kv_cache.KVCache(model.layers, model.kv_heads, model.head_dim, 7, torch.bfloat16)
    with noted() as wanted:
        for _ in range(BATCHES):
            inputs = random_step(limits, draw)
            hidden = decoder.forward(inputs, kv, pool.pages).index_select(0, inputs.logits_rows)
            decoder.logits(hidden)
    found["serving"] = [list(key) for key in wanted]
    return found


@torch.inference_mode()
def main(folder: str, output: str) -> None:
    driver = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    triton.runtime.driver.set_active(driver)
    on_device = classmethod(lambda cls, parts, bias: cls(parts, bias))
    with (
        patch.object(dispatch, "on_gpu", lambda x: True),
        patch.object(Fragments, "on_device", on_device),
        patch.object(kv_cache, "empty_caches", caches),
    ):
        found = [keys(limits, folder, random.Random(number)) for number, limits in enumerate(LIMITS)]
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
