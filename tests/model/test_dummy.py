"""Random weights of a shape: reproducible, finite, as large as real ones, and made one linear at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorry.kernels import nf4
from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.load import load_model, read_config
from lorry.server.model.readers.dummy import DummyCheckpoint
from lorry.server.model.weights import HEAD

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008,
}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 515,
    "hidden_size": 320,
    "intermediate_size": 704,
    "num_hidden_layers": 24,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_it_computes_like_a_model(folder: Path, tools: Any) -> None:
    decoder = load_model(str(folder), load_format="dummy")
    prompt = torch.randint(0, 515, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    logits, other = tools.paged_logits(decoder, [prompt, prompt[::-1]], chunks=((64,), (9,)))
    assert logits.isfinite().all() and 0.3 < logits.std() < 3
    assert not torch.allclose(logits[-1], other[-1], atol=0.1)
    assert 4.12 < decoder.bits_per_linear_weight < 4.14
    again = load_model(str(folder), load_format="dummy")
    assert torch.equal(tools.paged_logits(again, [prompt], chunks=((64,),))[0], logits)


def test_weights_have_the_size_that_keeps_that_of_the_activations(folder: Path) -> None:
    checkpoint = DummyCheckpoint(read_config(folder)[0])
    weight, other = (checkpoint.linear(f"layers.{layer}.q", (704, 320)) for layer in range(2))
    assert isinstance(weight, NF4Weight) and isinstance(other, NF4Weight)
    dense = nf4.dequantize(weight, torch.float32)
    assert dense.std().item() == pytest.approx(320**-0.5, rel=0.1)
    assert not torch.equal(weight.packed, other.packed)
    reseeded = DummyCheckpoint(checkpoint.config, seed=1).linear("layers.0.q", (704, 320))
    assert isinstance(reseeded, NF4Weight) and not torch.equal(weight.packed, reseeded.packed)
    head = checkpoint.linear(HEAD, (515, 320))
    assert isinstance(head, torch.Tensor) and head.std().item() == pytest.approx(320**-0.5, rel=0.1)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"needs a folder with a config\.json"):
        load_model(str(tmp_path), load_format="dummy")


def test_the_examples_are_the_models_that_their_names_say() -> None:
    found = {}
    for path in sorted(CONFIGS.glob("*/config.json")):
        config, _ = read_config(path.parent)
        linears = config.layers * sum(n * k for n, k in config.linear_shapes().values())
        ends = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
        norms = config.hidden_size * (2 * config.layers + 1) + 2 * config.layers * config.head_dim * config.qk_norm
        found[path.parent.name] = linears + ends + norms
        assert all(window == (4096 if path.parent.name == "mistral-7b" else 0) for window in config.sliding_windows)
    sliced = found.pop("llama-3-70b-slice")
    assert found == PARAMETERS
    assert 8 * sliced == pytest.approx(70.55e9, rel=0.002)
