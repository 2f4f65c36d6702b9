"""The work that every system is measured on: prompts, adapters, who asks for which, and when.

The same files serve all of them: the base's weights as everybody can read them (the NF4 base dequantized to bfloat16,
so that nobody computes with other weights than ours), and adapters as PEFT folders. Prompts are token ids, so that
no tokenizer is measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from lorry.adapters.layout import ModelLayout
from lorry.kernels.lora import SITES
from lorry.kernels.nf4 import NF4Weight, dequantize
from lorry.server.model.load import open_checkpoint
from lorry.server.model.store import cache_root, resolve_model
from lorry.server.model.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LinearWeight,
    norm_names,
    read_ends,
    read_layer,
)

Popularity = Literal["uniform", "zipf"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a system.

    streams: requests in flight at once (closed loop); with `rate` the most that may be
    requests: how many in all
    rate: arrivals per second, Poisson; None: the next request starts when a stream is free
    adapters: how many different adapters the requests use; 0: the base alone
    popularity: of the adapters; uniform is dealt round, zipf falls with 1 / (place + 1)
    """

    streams: int = 16
    requests: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64
    adapters: int = 0
    popularity: Popularity = "uniform"
    rate: float | None = None
    seed: int = 0

    def again(self, times: int) -> Workload:
        """The same with other prompts, so that no cache of prefixes helps the second time."""
        return replace(self, seed=self.seed + times)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, `requests` × `prompt_tokens`, all different from each other."""
        rng = np.random.default_rng([self.seed, 1])
        ids: list[list[int]] = rng.integers(16, vocab_size, (self.requests, self.prompt_tokens)).tolist()
        return ids

    def adapter_of(self) -> list[int | None]:
        """Which adapter each request names."""
        if not self.adapters:
            return [None] * self.requests
        if self.popularity == "uniform":
            return [i % self.adapters for i in range(self.requests)]
        weights = 1.0 / np.arange(1, self.adapters + 1)
        rng = np.random.default_rng([self.seed, 2])
        chosen: list[int | None] = rng.choice(self.adapters, self.requests, p=weights / weights.sum()).tolist()
        return chosen

    def arrivals(self) -> list[float]:
        """Seconds from the start at which each request may begin."""
        if self.rate is None:
            return [0.0] * self.requests
        gaps: list[float] = np.cumsum(
            np.random.default_rng([self.seed, 3]).exponential(1 / self.rate, self.requests)
        ).tolist()
        return gaps


def adapter_name(index: int) -> str:
    """Folder and id of the index-th adapter."""
    return f"adapter-{index:03d}"


def bench_folder() -> Path:
    """Where the base and the adapters of the benchmark are kept: a folder in the user's cache."""
    return cache_root().parent / "bench"


def export_base(model: str, root: Path) -> Path:
    """A Hugging Face folder in bfloat16 with the weights that the NF4 base of `model` stands for; kept by name."""
    source = resolve_model(model)
    target = root / f"{source.name}-dequantized"
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _tensors(source)}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (partial / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=1))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, partial / name)
    partial.rename(target)
    return target


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    checkpoint = open_checkpoint(folder)
    ends = read_ends(checkpoint)
    yield EMBEDDING, ends.embedding
    yield FINAL_NORM, ends.final_norm
    if ends.head is not None:
        yield f"{HEAD}.weight", _dense(ends.head)
    for number in range(checkpoint.config.layers):
        layer = read_layer(checkpoint, number)
        for field, (name, _) in norm_names(checkpoint.config, number).items():
            yield name, getattr(layer, field)
        for site, weight in layer.linears.items():
            yield f"{ModelLayout.module_path(number, site)}.weight", _dense(weight)
        for site, bias in layer.biases.items():
            yield f"{ModelLayout.module_path(number, site)}.bias", bias
    checkpoint.close()


def _dense(weight: LinearWeight) -> torch.Tensor:
    return dequantize(weight) if isinstance(weight, NF4Weight) else weight


def write_adapters(base: Path, root: Path, count: int, rank: int = 16, seed: int = 0) -> Path:
    """A folder of `count` random PEFT adapters on all seven linears, in bfloat16; those that are there are kept.

    B is not zero: it is small and random, so that every adapter changes the text.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    folder = root / f"{base.name}-rank{rank}-seed{seed}"
    for index in range(count):
        target = folder / adapter_name(index)
        if (target / "adapter_config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for site, (out, inner) in linear_shapes(config).items():
                name = f"base_model.model.{ModelLayout.module_path(layer, site)}"
                a = torch.randn(rank, inner, generator=generator) * inner**-0.5
                b = torch.randn(out, rank, generator=generator) * 0.02
                tensors[f"{name}.lora_A.weight"] = a.to(torch.bfloat16)
                tensors[f"{name}.lora_B.weight"] = b.to(torch.bfloat16)
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(_peft_config(rank), indent=1))
    return folder


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear of a model, from its config.json."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query), (middle, hidden), (middle, hidden))
    return dict(zip(SITES, (*shapes, (hidden, middle)), strict=True))


def _peft_config(rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(SITES),
    }
