"""Random weights of a shape: reproducible, finite, as large as real ones, and made one linear at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorry.kernels import nf4
from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.config import ModelConfig
from lorry.server.model.decoder import Decoder
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.load import load_model, read_config
from lorry.server.model.quantizing import QuantizingCheckpoint
from lorry.server.model.readers.dummy import DummyCheckpoint
from lorry.server.model.weights import HEAD, LinearWeight

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
WIDER = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
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
    again = load_model(str(folder), load_format="dummy")
    assert torch.equal(tools.paged_logits(again, [prompt], chunks=((64,),))[0], logits)
    reseeded = load_model(str(folder), load_format="dummy", seed=1)
    assert not torch.allclose(tools.paged_logits(reseeded, [prompt], chunks=((64,),))[0], logits, atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_it_tells_tokens_apart_after_many_layers(tied: bool, folder: Path, tools: Any) -> None:
    """Inner columns in the width of a real model: the least mean of the weights would add up here."""
    shape = {"num_hidden_layers": 32, "intermediate_size": 4096}
    (folder / "config.json").write_text(json.dumps(TINY | shape | {"tie_word_embeddings": tied}))
    decoder = load_model(str(folder), load_format="dummy")
    (logits,) = tools.paged_logits(decoder, [list(range(100, 140))], chunks=((40,),))
    assert len(set(logits.argmax(-1).tolist())) > 6
    assert float(torch.corrcoef(logits).fill_diagonal_(0).mean()) < 0.85


def test_bits_are_those_of_a_quantized_checkpoint(folder: Path) -> None:
    """Codes, an absmax of 8 bits for 64 weights, one of 32 for 256 of those; two tables for all."""
    (folder / "config.json").write_text(json.dumps(TINY | WIDER))
    decoder = load_model(str(folder), load_format="dummy")
    weights = sum(projection.nf4_weights for projection in decoder.projections)
    bits = 8 * (16 + 256) * 4 / weights + 4 + 8 / 64 + 32 / (64 * 256)
    assert decoder.bits_per_linear_weight == pytest.approx(bits, rel=1e-5)
    assert bits == pytest.approx(4.127, abs=1e-3)


def test_weights_have_the_size_that_keeps_that_of_the_activations(folder: Path) -> None:
    checkpoint = DummyCheckpoint(read_config(folder)[0])
    weight, other = (checkpoint.linear(f"layers.{layer}.q", (704, 320)) for layer in range(2))
    assert isinstance(weight, NF4Weight) and isinstance(other, NF4Weight)
    dense = nf4.dequantize(weight, torch.float32)
    assert dense.std().item() == pytest.approx(320**-0.5, rel=0.03)
    assert abs(dense.mean().item()) < 5 * dense.std().item() / dense.numel() ** 0.5
    assert not torch.equal(weight.packed, other.packed)
    reseeded = DummyCheckpoint(checkpoint.config, seed=1).linear("layers.0.q", (704, 320))
    assert isinstance(reseeded, NF4Weight) and not torch.equal(weight.packed, reseeded.packed)
    head = checkpoint.linear(HEAD, (515, 320))
    assert isinstance(head, Tensor) and head.std().item() == pytest.approx(320**-0.5, rel=0.1)
    assert (checkpoint.tensor("model.norm.weight", (320,)) == 1).all()
    assert not checkpoint.tensor("model.layers.0.self_attn.q_proj.bias", (320,)).any()


class Held(TorchDispatchMode):
    """`bytes`: of all tensors made inside that are still there; `most`: how many there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class Normal:
    """A checkpoint in 16 bits that is made as it is read."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        return torch.randn(shape, dtype=torch.bfloat16)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("source", ["dummy", "quantized in flight"])
def test_one_layer_beside_the_model(source: str, interpreted: None, folder: Path) -> None:
    """On a GPU's path: while a model loads, no more is held than itself and what one layer takes in 16 bits; at the
    end, itself alone."""
    (folder / "config.json").write_text(json.dumps(TINY | WIDER))
    config, _ = read_config(folder)
    layer = sum(rows * columns for rows, columns in config.linear_shapes().values())
    with Held() as held:
        checkpoint = DummyCheckpoint(config) if source == "dummy" else QuantizingCheckpoint(Normal(config))
        at_start = held.bytes  # the pool of random blocks
        decoder = Decoder.from_checkpoint(checkpoint, dtype=torch.bfloat16)
        assert held.most - at_start < decoder.weight_bytes + 2 * layer
        rest = held.bytes - at_start - decoder.weight_bytes
    assert decoder.weight_bytes > 8 * layer / 2 + 2 * 2048 * 512 * 2
    assert 0 <= rest < 0.05 * decoder.weight_bytes


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
    norms = 161 * 8192  # of the 70B; each device has them all
    assert sliced == (70_553_706_496 - norms) // 8 + norms
