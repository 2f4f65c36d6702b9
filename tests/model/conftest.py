"""Oracles of the model room: transformers over the dequantized base, and a paged run through shuffled blocks."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorry.adapters.canonical import CanonicalLinear, page_count, to_pages
from lorry.kernels.lora import SITES, VECTORS, AdapterPages, Segments
from lorry.server.cache.kv_cache import KVCache
from lorry.server.model.decoder import Decoder
from lorry.server.model.inputs import ModelInputs

sys.path.insert(0, str(Path(__file__).parent))  # tiny_gguf.py serves several tests here

BLOCK = 16


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def tiny_model(model_type: str, dtype: torch.dtype, **shape: Any) -> PreTrainedModel:
    """A random transformers model whose logits are far from uniform; biases and norms are not their defaults."""
    torch.manual_seed(sum(map(ord, model_type)))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.9 / parameter.shape[-1] ** 0.5)
            parameter.data = parameter.data.to(dtype)  # not model.to(dtype): that would round inv_freq, too
    return model


def nf4_round(weight: Tensor, double: bool = True) -> Tensor:
    """What bitsandbytes makes of a weight: quantize, with double quantization or without, then dequantize.

    Flat, because its CPU kernel dequantizes rows whose length is even but no multiple of 64 wrongly.
    """
    flat = weight.detach().reshape(-1)
    packed, state = bnb.quantize_4bit(flat, quant_type="nf4", compress_statistics=double)
    rounded: Tensor = bnb.dequantize_4bit(packed, state)
    return rounded.view(weight.shape)


def dequantized_base(model: PreTrainedModel) -> PreTrainedModel:
    """Round the linears of all layers to NF4 in place, as the head and the embedding are not."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.split(".")[-1] in SITES:
                module.weight.copy_(nf4_round(module.weight))
    return model


def reference_logits(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """float32 [len, V] of each sequence, each run alone."""
    with torch.no_grad():
        return [model(torch.tensor([list(ids)])).logits[0].float() for ids in sequences]


def paged_logits(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    *,
    chunks: Sequence[Sequence[int]],
    kv_dtype: torch.dtype = torch.float32,
    pages: AdapterPages | None = None,
    combos: Sequence[tuple[tuple[int, float], ...]] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Logits [len, V] at every position of every sequence, run in one batch over a paged cache.

    Step t takes `chunks[s][t]` tokens of sequence s, and one where the list has ended; tables point at shuffled
    blocks of a cache filled with NaN, so that a read of anything not stored shows.
    """
    config, device = decoder.config, torch.device("cpu")
    needed = [-(-len(ids) // BLOCK) for ids in sequences]
    blocks = sum(needed) + 3
    kv = KVCache(config.layers, config.kv_heads, config.head_dim, blocks, kv_dtype)
    for tensor in (*kv.keys, *kv.values):
        tensor.fill_(torch.nan)
    free = list(range(blocks))
    random.Random(seed).shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in needed]
    done = [0] * len(sequences)
    rows: list[list[Tensor]] = [[] for _ in sequences]
    step = 0
    while any(done[s] < len(ids) for s, ids in enumerate(sequences)):
        tokens, positions, slots, cu, lengths, block_rows = [], [], [], [0], [], []
        members = []
        for s, ids in enumerate(sequences):
            take = chunks[s][step] if step < len(chunks[s]) else 1
            take = min(take, len(ids) - done[s])
            if take == 0:
                continue
            span = range(done[s], done[s] + take)
            tokens += [ids[p] for p in span]
            positions += list(span)
            slots += [tables[s][p // BLOCK] * BLOCK + p % BLOCK for p in span]
            cu.append(cu[-1] + take)
            lengths.append(span.stop)
            block_rows.append(tables[s] + [0] * (max(needed) - len(tables[s])))
            members.append((s, take))
            done[s] += take
        segments = None if combos is None else _segments(members, cu, combos)
        ends = segments if pages is not None and pages.ends is not None else None
        inputs = ModelInputs(
            token_ids=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            cu_seqlens_q=torch.tensor(cu, dtype=torch.int32),
            kv_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.tensor(block_rows, dtype=torch.int32),
            segments=segments,
            logits_rows=torch.arange(len(tokens)),
            logits_segments=ends,
        )
        logits = decoder.logits(decoder.forward(inputs, kv, pages)[inputs.logits_rows], None, ends, pages)
        for index, (s, _) in enumerate(members):
            rows[s].append(logits[cu[index] : cu[index + 1]])
        step += 1
    return [torch.cat(parts) for parts in rows]


def _segments(
    members: Sequence[tuple[int, int]], cu: Sequence[int], combos: Sequence[tuple[tuple[int, float], ...]]
) -> Segments:
    """One segment per sequence, and an empty one behind the first."""
    starts = [cu[0], cu[1], *cu[1:]]
    chosen = [combos[s] for s, _ in members]
    chosen.insert(1, combos[-1])
    width = max(1, max(len(combo) for combo in chosen))
    slots = torch.full((len(chosen), width), -1, dtype=torch.int32)
    weights = torch.zeros(len(chosen), width)
    for row, combo in enumerate(chosen):
        for column, (slot, weight) in enumerate(combo):
            slots[row, column], weights[row, column] = slot, weight
    return Segments(torch.tensor(starts, dtype=torch.int32), slots, weights)


def pages_of(
    decoder: Decoder, adapters: Sequence[dict[tuple[int, str], tuple[Tensor, Tensor, float]]], vectored: int = -1
) -> AdapterPages:
    """Pages of {(layer, site): (A [r, K], B [N, r], scaling)} per slot, in float32; slot `vectored` has vectors too."""
    most = max(page_count(a.shape[0]) for adapter in adapters for a, _, _ in adapter.values())
    shape = (len(adapters), decoder.config.layers, len(SITES))
    offsets = torch.full((*shape, most + 1), -1, dtype=torch.int64)
    scalings = torch.zeros(shape)
    arena: list[Tensor] = [torch.full((8,), torch.nan)]  # pages lie at multiples of 8
    used = 8
    for slot, adapter in enumerate(adapters):
        for (layer, site), (a, b, scaling) in adapter.items():
            vectors = 0.2 * torch.randn(2, b.shape[0]) if slot == vectored else None
            linear = CanonicalLinear(to_pages(a, b, torch.float32), scaling, vectors)
            scalings[slot, layer, SITES.index(site)] = scaling
            count = linear.pages.shape[0]
            for index in range(count + (vectors is not None)):
                content = linear.page(index)
                offsets[slot, layer, SITES.index(site), index] = used + (VECTORS if index == count else 0)
                arena.append(content)
                used += content.numel()
    return AdapterPages(torch.cat(arena), offsets, scalings)


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        relative_rms=relative_rms,
        nf4_round=nf4_round,
        tiny_model=tiny_model,
        dequantized_base=dequantized_base,
        reference_logits=reference_logits,
        paged_logits=paged_logits,
        pages_of=pages_of,
    )
