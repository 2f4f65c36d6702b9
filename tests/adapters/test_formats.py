"""Configs and names as trainers have written them over the years: PEFT's releases, unsloth, axolotl, state dicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import NoBase
from safetensors.torch import load_file, save_file

from lorry.adapters.catalog import Catalog
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter

OLDEST: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "huggyllama/llama-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
RELEASES: dict[str, dict[str, Any]] = {"0.4": OLDEST}
RELEASES["0.7"] = OLDEST | {
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
}
RELEASES["0.11"] = RELEASES["0.7"] | {"layer_replication": None, "use_dora": False, "use_rslora": True}
RELEASES["0.14"] = RELEASES["0.11"] | {"eva_config": None, "exclude_modules": None, "lora_bias": False}
RELEASES["0.17"] = RELEASES["0.14"] | {
    "corda_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}
WRITERS = {f"PEFT {release}": config for release, config in RELEASES.items()} | {
    "unsloth": RELEASES["0.17"]
    | {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
        "lora_alpha": 16,
        "lora_dropout": 0,
        "peft_version": "0.17.1",
        "revision": "unsloth",
    },
    "axolotl": RELEASES["0.14"]
    | {
        "base_model_name_or_path": "NousResearch/Meta-Llama-3-8B",
        "fan_in_fan_out": None,
        "lora_alpha": 32,
        "target_modules": ["v_proj", "q_proj"],
    },
    "a trainer without a task": RELEASES["0.7"] | {"task_type": None},
}

NAMES: dict[str, Callable[[str], str]] = {
    "PEFT": lambda name: name,
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "of the model inside": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("writer", WRITERS)
def test_each_writers_folder_is_read(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path, writer: str, names: str
) -> None:
    write_adapter(tmp_path / "a", sites=("q_proj", "v_proj"), rank=8)
    config = WRITERS[writer]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config, indent=2))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({NAMES[names](name): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    place = Catalog(tmp_path).find("a")
    assert place is not None
    adapter = load_adapter(place, layout, torch.float32, NoBase())
    assert set(adapter.linears) == {(layer, site) for layer in range(3) for site in ("q_proj", "v_proj")}
    scaling = config["lora_alpha"] / (8**0.5 if config.get("use_rslora") else 8)
    assert all(linear.scaling == pytest.approx(scaling) for linear in adapter.linears.values())
    assert adapter.rank == 8
