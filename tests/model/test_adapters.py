"""LoRA on all seven linears against PEFT over the same dequantized base, in one mixed batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from lorry.kernels.layers import Layers
from lorry.kernels.lora import SITES
from lorry.server.model.load import load_model

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "qwen2-odd": (
        "qwen2",
        {"hidden_size": 90, "intermediate_size": 77, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
}

RANKS = {"first": 5, "second": 19}
COMBOS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("first", 1.0),),
    (("second", -0.75), ("first", 1.5)),
    (("second", 1.0),),
    (("first", 1.0),),
)
LENGTHS = (37, 3, 29, 16, 1)
CHUNKS = ((21, 7), (3,), (17, 1, 11), (16,), ())


@pytest.mark.parametrize("name", SHAPES)
def test_mixed_batch_equals_peft(
    name: str, tools: Any, with_adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, shape = SHAPES[name]
    model = tools.tiny_model(
        model_type, torch.float32, **shape, num_hidden_layers=2, vocab_size=131, max_position_embeddings=64
    )
    model.save_pretrained(tmp_path)
    peft = with_adapters(tools.dequantized_base(model))
    decoder = load_model(str(tmp_path))
    pages = tools.pages_of(decoder, [weights_of(peft, adapter) for adapter in RANKS])
    slots = {adapter: slot for slot, adapter in enumerate(RANKS)}
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 131, (length,), generator=generator).tolist() for length in LENGTHS]

    combos = [tuple((slots[adapter], weight) for adapter, weight in combo) for combo in COMBOS]
    actual = tools.paged_logits(decoder, prompts, chunks=CHUNKS, pages=pages, combos=combos)
    monkeypatch.setattr(Layers, "serve", staticmethod(lambda *_: False))
    one_by_one = tools.paged_logits(load_model(str(tmp_path)), prompts, chunks=CHUNKS, pages=pages, combos=combos)
    assert all(map(torch.equal, actual, one_by_one))
    for row, (prompt, combo) in enumerate(zip(prompts, COMBOS, strict=True)):
        expected = peft_logits(peft, prompt, combo)
        assert tools.relative_rms(actual[row], expected) < 1e-4
        if combo:
            assert tools.relative_rms(peft_logits(peft, prompt, ()), expected) > 0.05


@pytest.fixture
def with_adapters(random_peft: Any) -> Callable[[Any], PeftModel]:
    """with_adapters(model): random A and B of both ranks on every linear, large enough to change the logits."""
    configs = {
        adapter: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(SITES)) for adapter, rank in RANKS.items()
    }
    return lambda model: random_peft(model, configs, 0.08)


def weights_of(peft: Any, adapter: str) -> dict[tuple[int, str], tuple[Tensor, Tensor, float]]:
    found = {}
    for key, module in peft.named_modules():
        site = key.split(".")[-1]
        if site in SITES and hasattr(module, "lora_A"):
            layer = int(key.split(".layers.")[1].split(".")[0])
            found[layer, site] = (
                module.lora_A[adapter].weight.detach(),
                module.lora_B[adapter].weight.detach(),
                module.scaling[adapter],
            )
    return found


def peft_logits(peft: Any, prompt: list[int], combo: tuple[tuple[str, float], ...]) -> Tensor:
    weighted = copy.deepcopy(peft)
    for module in weighted.modules():
        if hasattr(module, "lora_A"):
            for adapter, weight in combo:
                module.scaling[adapter] *= weight
    with torch.no_grad():
        if not combo:
            with weighted.disable_adapter():
                plain: Tensor = weighted(torch.tensor([prompt])).logits[0]
                return plain
        weighted.base_model.set_adapter([adapter for adapter, _ in combo])
        logits: Tensor = weighted(torch.tensor([prompt])).logits[0]
        return logits


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "most"),
    [
        (torch.float16, torch.float16, 3e-3),
        (torch.float32, torch.float8_e4m3fn, 5e-3),  # a key near the middle of two numbers rounds either way
    ],
)
def test_the_path_of_a_gpu_equals_that_of_a_cpu(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    most: float,
    tools: Any,
    with_adapters: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """tests/engine/test_interpreted.py has float32."""
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = tools.tiny_model(
        "llama", torch.float32, **shape, num_hidden_layers=2, vocab_size=131, max_position_embeddings=64
    )
    model.save_pretrained(tmp_path)
    peft = with_adapters(tools.dequantized_base(model))
    decoder = load_model(str(tmp_path))
    weights = [weights_of(peft, adapter) for adapter in RANKS]
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 131, (length,), generator=generator).tolist() for length in (18, 3, 1)]
    combos = [tuple((list(RANKS).index(adapter), weight) for adapter, weight in combo) for combo in COMBOS[:3]]
    vectored = combos[0][0][0] if combos[0] else combos[1][0][0]
    chunks, pages = ((17,), (), ()), tools.pages_of(decoder, weights, vectored)
    of_cpu = kv_dtype if kv_dtype.itemsize == 1 else torch.float32
    expected = tools.paged_logits(decoder, prompts, chunks=chunks, kv_dtype=of_cpu, pages=pages, combos=combos)
    request.getfixturevalue("interpreted")
    decoder = load_model(str(tmp_path), dtype=dtype)
    actual = tools.paged_logits(decoder, prompts, chunks=chunks, kv_dtype=kv_dtype, pages=pages, combos=combos)
    for ours, theirs in zip(actual, expected, strict=True):
        assert tools.relative_rms(ours, theirs) < most
