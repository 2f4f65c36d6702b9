"""A tiny random Llama on disk, random adapters beside it, and engines over them in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorry.kernels.lora import SITES
from lorry.server.config import MIB, EngineConfig
from lorry.server.engine.build import Types
from lorry.server.engine.local import LocalEngine
from lorry.server.engine.messages import AdapterRef, Generate, SamplingParams, StoppingParams
from lorry.server.model.decoder import Decoder
from lorry.server.model.load import load_model

sys.path.insert(0, str(Path(__file__).parent))  # peft_oracle.py serves several tests here

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 300,
    "eos_token_id": 1,
}
SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1200,
    "eos_token_id": 1,
}
RANKS = {"a": 3, "b": 16, "c": 17, "d": 5, "e": 40, "f": 1, "g": 8, "h": 33}


def write_adapter(folder: Path, decoder: Decoder, rank: int, seed: int, **fields: Any) -> None:
    """A PEFT folder with random A and B on every linear, strong enough to change the tokens; fields: of its config."""
    generator = torch.Generator().manual_seed(seed)
    layout = decoder.layout
    tensors = {}
    for layer in range(layout.layers):
        for site, (inputs, outputs) in layout.sites.items():
            name = f"base_model.model.{layout.module_path(layer, site)}"
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, rank, generator=generator) / rank**0.5
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 0.7 * rank, "target_modules": list(SITES)}
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1.1 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose shapes the Triton kernels serve."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1.1 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(model_folder: Path) -> Decoder:
    with torch.inference_mode():
        return load_model(str(model_folder))


@pytest.fixture(scope="session")
def adapters_dir(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        write_adapter(folder / name, decoder, rank, seed)
    broken = folder / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}')
    return folder


Build = Callable[..., LocalEngine]


@pytest.fixture
def build(decoder: Decoder, adapters_dir: Path) -> Iterator[Build]:
    """Engines in float32 throughout; keywords are EngineConfig's, `blocks` sets the KV memory. ahead: driven as a GPU
    is, with a CPU in its place."""
    engines: list[LocalEngine] = []

    def make(blocks: int = 400, *, ahead: bool = False, **changes: Any) -> LocalEngine:
        model = decoder.config
        config: dict[str, Any] = {
            "kv_dtype": "float32",
            "adapter_dtype": "float32",
            "adapter_memory": 8 * MIB,
            "adapters_dir": str(adapters_dir),
            "kv_memory": blocks * 2 * model.layers * model.kv_heads * 16 * model.head_dim * 4,
            "max_running": 16,
            "token_budget": 64,
            "debug_checks": True,
        }
        chosen = EngineConfig(**config | changes)
        engine = LocalEngine(decoder, chosen, replace(Types.choose(chosen), ahead=ahead))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        while engine.engine.scheduler.requests or engine.channel.commands:
            engine.step()
        engine.engine.check()
        assert engine.engine.scheduler.allocator.used == 0, "blocks are left behind"
        engine.close()


def generate(
    name: str,
    prompt: list[int],
    new: int = 12,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    n: int = 1,
    adapters: dict[str, float] | None = None,
    stop: tuple[int, ...] = (),
    ignore_eos: bool = True,
    min_new: int = 0,
    time_limit: float | None = None,
    **rest: Any,
) -> Generate:
    """A request in few words; greedy by default."""
    return Generate(
        name,
        prompt,
        SamplingParams(temperature=temperature, seed=seed, n=n),
        StoppingParams(new, min_new, stop, ignore_eos, time_limit),
        tuple(AdapterRef(each, weight) for each, weight in (adapters or {}).items()),
        **rest,
    )


@pytest.fixture(name="generate")
def _generate() -> Callable[..., Generate]:
    return generate


@pytest.fixture(name="write_adapter", scope="session")
def _write_adapter() -> Callable[..., None]:
    return write_adapter
