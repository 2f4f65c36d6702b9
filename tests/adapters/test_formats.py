"""Configs and names as trainers have written them over the years: PEFT's releases, unsloth, axolotl, state dicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from random_adapters import NoBase
from safetensors.torch import load_file, save_file

from lorry.adapters.catalog import Catalog
from lorry.adapters.errors import MalformedAdapter
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading.report import report_on

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
    "PEFT 0.21": RELEASES["0.17"]
    | {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "kasa_config": None,
        "lora_ga_config": None,
        "monteclora_config": None,
        "peft_version": "0.21.2",
        "runtime_config": {"ephemeral_gpu_offload": False},
        "use_bdlora": None,
        "velora_config": None,
    },
    "a PEFT of the future": RELEASES["0.17"]
    | {"some_config": None, "use_something": False, "some_pattern": {}, "some_list": [], "some_name": ""},
    "a trainer without a task": RELEASES["0.7"] | {"task_type": None},
}

NAMES: dict[str, Callable[[str], str]] = {
    "PEFT": lambda name: name,
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "of the model inside": lambda name: name.removeprefix("base_model.model."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("0.", "0._fsdp_wrapped_module."),
    "checkpointed": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
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
    report = report_on(place, layout, torch.float32, NoBase(), lambda: "")
    assert report.error is None and report.probe is not None


def test_the_installed_peft_writes_no_other_field(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", sites=("q_proj",), rank=4)
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "a")
    place = Catalog(tmp_path).find("a")
    assert place is not None and load_adapter(place, layout, torch.float32, NoBase()).rank == 4


FOREIGN: dict[str, tuple[Callable[[str], str], str]] = {
    "a larger model, transformers 4.52 on": (
        lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
        "of the language model inside a larger one: take language_model out",
    ),
    "a larger model, before": (
        lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
        "of the language model inside a larger one",
    ),
    "images": (lambda name: name.replace("model.model.layers", "model.visual.blocks"), "of what sees or hears"),
    "experts": (lambda name: name.replace("self_attn", "mlp.experts.3"), "of a mixture of experts"),
    "MLX": (lambda name: name.replace("lora_A.weight", "lora_a"), "as MLX and torchtune call it"),
    "torchtune": (lambda name: name.replace("lora_A", "lora_a"), "as MLX and torchtune call it"),
    "kohya": (lambda name: name.replace("lora_A", "lora_down"), "as kohya's trainers call it"),
    "without the head": (
        lambda name: name.replace("model.model.layers", "model.layers"),
        "of a model without its head: begin the names with base_model.model.model.",
    ),
    "another adapter's name": (lambda name: name.replace(".weight", ".default_0.weight"), "of an adapter by a name"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_names_of_others_are_called_by_their_kind(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path, case: str
) -> None:
    change, message = FOREIGN[case]
    write_adapter(tmp_path / "a", sites=("q_proj",))
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    place = Catalog(tmp_path).find("a")
    assert place is not None
    with pytest.raises(MalformedAdapter, match=f"no rule uses the tensor .*, {message}"):
        load_adapter(place, layout, torch.float32, NoBase())


def test_two_names_of_one_tensor(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = min(tensors)
        tensors[f"_orig_mod.{name}"] = tensors[name].clone()

    write_adapter(tmp_path / "a", edit=edit)
    place = Catalog(tmp_path).find("a")
    assert place is not None
    with pytest.raises(MalformedAdapter, match="are the same tensor"):
        load_adapter(place, layout, torch.float32, NoBase())


OF_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json")
BESIDES = (*OF_TRAINING, "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json")


def test_what_else_trainers_put_into_the_folder(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain")
    write_adapter(tmp_path / "a")
    for name in (*BESIDES, "adapter_model.bin", "global_step7"):
        (tmp_path / "a" / name).write_bytes(b"\x80 anything")
    (tmp_path / "a/checkpoint-7").mkdir()
    plain, other = (Catalog(tmp_path).find(name) for name in ("plain", "a"))
    assert plain is not None and other is not None
    read = [load_adapter(place, layout, torch.float32, NoBase()) for place in (plain, other)]
    assert read[0].revision == read[1].revision


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (OF_TRAINING, "the folder has no adapter_model.safetensors$"),
        ((*OF_TRAINING, "adapter_model.bin"), "^adapter_model.bin is not read, .*: load it with PEFT and save it"),
        (("adapter_model-00001-of-00002.bin", "adapter_model.bin.index.json"), "^adapter_model-00001-of-00002.bin is"),
        (("pytorch_model.bin",), "^pytorch_model.bin is not read"),
    ],
)
def test_a_folder_without_weights(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    for name in names:
        (tmp_path / "a" / name).write_bytes(b"\x80 anything")
    place = Catalog(tmp_path).find("a")
    assert place is not None
    with pytest.raises(MalformedAdapter, match=message):
        load_adapter(place, layout, torch.float32, NoBase())


def test_the_folder_of_a_training_names_its_checkpoints(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "run/checkpoint-500")
    place = Catalog(tmp_path).find("run")
    assert place is not None
    with pytest.raises(MalformedAdapter, match="but checkpoint-500 in it has: name that folder"):
        load_adapter(place, layout, torch.float32, NoBase())
    assert load_adapter(Catalog(tmp_path).resolve("run/checkpoint-500"), layout, torch.float32, NoBase()).rank == 8
