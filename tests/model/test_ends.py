"""Adapters that change the embedding, the head or a whole matrix, against the same changes made in transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorry.adapters.canonical import CanonicalAdapter, CanonicalLinear, to_pages
from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import ENDS, Linear
from lorry.kernels.layers import Layers
from lorry.server.model.load import load_model

VOCABULARY, HIDDEN = 311, 288  # 18 pages of a square matrix do not fit into one slot's tables
EMBEDDING, HEAD, DOWN = (ENDS, "embed_tokens"), (ENDS, "lm_head"), (1, "down_proj")
TOKENS = torch.tensor([7, 310, 0])
LENGTHS = (37, 3, 29, 16, 1, 20, 9, 22)
CHUNKS = ((21, 7), (3,), (17, 1, 11), (16,), (), (20,), (2, 7), (22,))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(inputs: int, outputs: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    return randn(rank, inputs, seed=seed) / 3, randn(outputs, rank, seed=seed + 1) / 3


def canonical(a: Tensor, b: Tensor, scaling: float, gain: Tensor | None = None) -> CanonicalLinear:
    vectors = None if gain is None else torch.stack([gain, torch.zeros_like(gain)])
    return CanonicalLinear(to_pages(a, b, torch.float32), scaling, vectors)


def own(weight: Tensor) -> CanonicalLinear:
    """A matrix [N, K] in place of the base's."""
    outputs, inputs = weight.shape
    a, b = (torch.eye(inputs), weight) if inputs <= outputs else (weight, torch.eye(outputs))
    return canonical(a, b, 1.0, torch.full((outputs,), -1.0))


def replace_weight(module: nn.Module, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight.clone())


Change = tuple[dict[Linear, CanonicalLinear], Callable[[Any], None]]
"""The linears of an adapter, and the same done to a model of transformers."""


def embedding_lora(model: Any) -> Change:
    a, b = low_rank(*model.lm_head.weight.shape, 5, 1)
    table = model.model.embed_tokens.weight + 0.7 * (b @ a).T
    return {EMBEDDING: canonical(a, b, 0.7)}, lambda m: replace_weight(m.model.embed_tokens, table)


def head_lora(model: Any) -> Change:
    a, b = low_rank(*model.lm_head.weight.T.shape, 17, 3)
    weight = model.lm_head.weight + 0.2 * b @ a
    return {HEAD: canonical(a, b, 0.2)}, lambda m: replace_weight(m.lm_head, weight)


def own_ends(model: Any) -> Change:
    shape = model.lm_head.weight.shape
    table, head = randn(*shape, seed=5), randn(*shape, seed=6) / 9

    def change(m: Any) -> None:
        replace_weight(m.model.embed_tokens, table)
        replace_weight(m.lm_head, head)

    return {EMBEDDING: own(table.T), HEAD: own(head)}, change


def token_rows(model: Any) -> Change:
    """Of both ends, as where they are one matrix."""
    before, head = model.model.embed_tokens.weight, model.lm_head.weight
    rows = randn(len(TOKENS), head.shape[1], seed=7)
    one_hot = nn.functional.one_hot(TOKENS, len(head)).float()
    gain = -one_hot.sum(0)
    linears = {
        EMBEDDING: canonical(one_hot, (rows - before[TOKENS]).T, 1.0),
        HEAD: canonical(rows, one_hot.T, 1.0, gain),
    }
    table, changed = before.clone(), head.clone()
    table[TOKENS], changed[TOKENS] = rows, rows

    def change(m: Any) -> None:
        replace_weight(m.model.embed_tokens, table)
        replace_weight(m.lm_head, changed)

    return linears, change


def own_linear(model: Any) -> Change:
    weight = randn(*model.model.layers[1].mlp.down_proj.weight.shape, seed=8) / 12
    return {DOWN: own(weight)}, lambda m: replace_weight(m.model.layers[1].mlp.down_proj, weight)


CHANGES = (embedding_lora, head_lora, own_ends, token_rows, own_linear)


SHAPE = {"num_hidden_layers": 2, "num_key_value_heads": 1, "intermediate_size": 320, "max_position_embeddings": 64}


def resident(pool: PagePool, changes: list[Change]) -> list[tuple[int, ...]]:
    """The slots of each."""
    slots = []
    for linears, _ in changes:
        slot = pool.insert(CanonicalAdapter(linears, 16, (), (), ""))
        assert slot is not None
        slots.append(pool.all_slots(slot))
    return slots


@pytest.mark.parametrize("tied", [False, True])
def test_the_ends_and_whole_matrices(tied: bool, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "tie_word_embeddings": tied}
    model = tools.tiny_model("llama", torch.float32, **SHAPE, **ends, num_attention_heads=3)
    model.save_pretrained(tmp_path)
    decoder, base = load_model(str(tmp_path)), tools.dequantized_base(model)
    pool = PagePool(decoder.layout, 16 << 20, torch.float32, max_slots=9)
    with torch.no_grad():
        changes = [make(base) for make in CHANGES]
    slots = resident(pool, changes)
    assert list(map(len, slots)) == [1, 1, 2, 1, 2]
    combos = [(), *(tuple((slot, 1.0) for slot in own) for own in slots)]
    combos.append(((slots[0][0], -0.5), (slots[1][0], 2.0)))
    combos.append(((slots[1][0], 1.0),))
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    prompts[4] = TOKENS[:1].tolist()

    actual = tools.paged_logits(decoder, prompts, chunks=CHUNKS, pages=pool.pages, combos=combos)
    monkeypatch.setattr(Layers, "serve", staticmethod(lambda *_: False))
    one_by_one = tools.paged_logits(load_model(str(tmp_path)), prompts, chunks=CHUNKS, pages=pool.pages, combos=combos)
    assert all(map(torch.equal, actual, one_by_one))

    def mix(m: Any) -> None:
        for (_, change), weight in zip(changes[:2], (-0.5, 2.0), strict=True):
            before = [copy.deepcopy(end.weight) for end in (m.model.embed_tokens, m.lm_head)]
            change(m)
            for end, old in zip((m.model.embed_tokens, m.lm_head), before, strict=True):
                replace_weight(end, (old + weight * (end.weight - old)).detach())

    alone = [lambda m: None, *(change for _, change in changes), mix, changes[1][1]]
    for prompt, logits, change in zip(prompts, actual, alone, strict=True):
        changed = copy.deepcopy(base)
        with torch.no_grad():
            change(changed)
        (expected,) = tools.reference_logits(changed, [prompt])
        assert tools.relative_rms(logits, expected) < 1e-4
        if change is not alone[0]:
            (plain,) = tools.reference_logits(base, [prompt])
            assert tools.relative_rms(plain, expected) > 0.02
    pool.check()


def test_the_path_of_a_gpu_equals_that_of_a_cpu(tools: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ends = {"vocab_size": VOCABULARY, "hidden_size": 64, "tie_word_embeddings": False}
    model = tools.tiny_model("llama", torch.float32, **SHAPE, **ends, num_attention_heads=4)
    model.save_pretrained(tmp_path)
    decoder = load_model(str(tmp_path))
    pool = PagePool(decoder.layout, 16 << 20, torch.float32, max_slots=9)
    with torch.no_grad():
        slots = resident(pool, [make(model) for make in CHANGES])
    combos = [(), *(tuple((slot, 1.0) for slot in own) for own in slots)]
    prompts = [[7, 310], [3, 7], [300, 2], [299, 7], [0, 310], [9, 9]]
    chunks = ((2,), (), (1,), (2,), (2,), ())
    expected = tools.paged_logits(decoder, prompts, chunks=chunks, pages=pool.pages, combos=combos)
    request.getfixturevalue("interpreted")
    decoder = load_model(str(tmp_path))
    actual = tools.paged_logits(decoder, prompts, chunks=chunks, pages=pool.pages, combos=combos)
    for ours, theirs in zip(actual, expected, strict=True):
        assert tools.relative_rms(ours, theirs) < 1e-5
