"""PEFT is the oracle: a folder that PEFT wrote gives the same weights through rank pages, and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from random_adapters import NoBase
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers_with_pages import layout_of, served

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.segments import build_segments
from lorry.kernels.lora import SITES, Site, lora_add

ALL = list(SITES)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=89,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=12,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny(llama: LlamaForCausalLM) -> ModelLayout:
    return layout_of(llama)


CONFIGS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "rank 5, all linears": {"r": 5, "target_modules": "all-linear"},
    "rank 16": {"r": 16, "lora_alpha": 4.5, "target_modules": ["gate_proj", "down_proj"]},
    "rank 17": {"r": 17, "target_modules": ["o_proj", "k_proj"]},
    "rank 40, rslora": {"r": 40, "use_rslora": True, "target_modules": ALL},
    "one linear by regex": {"r": 4, "target_modules": r".*\.1\.mlp\.up_proj"},
    "some layers": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer by pattern": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "excluded": {"r": 6, "target_modules": ALL, "exclude_modules": r".*layers\.0\..*"},
    "patterns": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 33, r"layers\.[12]\.mlp\..*": 3, "model.layers.2.mlp.up_proj": 21},
        "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 5, "down_proj": 1, "mlp.*": 2},
    },
    "patterns, rslora": {
        "r": 8,
        "use_rslora": True,
        "target_modules": ["v_proj", "k_proj"],
        "rank_pattern": {"v_proj": 18},
        "alpha_pattern": {"k_proj": 7, "v_proj": 40},
    },
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def trained(llama: LlamaForCausalLM, folder: Path, **config: Any) -> dict[str, Tensor]:
    """Write a folder with PEFT, its tensors random; the delta weights [N, K] that PEFT computes, by module path."""
    model = peft.get_peft_model(llama, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    prefix = "base_model.model."
    deltas = {
        name.removeprefix(prefix): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    model.unload()
    return deltas


def read(folder: Path, layout: ModelLayout) -> CanonicalAdapter:
    place = Catalog(folder.parent).find(folder.name)
    assert place is not None
    return load_adapter(place, layout, torch.float32, NoBase())


@pytest.mark.parametrize("name", CONFIGS)
def test_pages_are_pefts_delta_weights(llama: LlamaForCausalLM, tiny: ModelLayout, tmp_path: Path, name: str) -> None:
    deltas = trained(llama, tmp_path / "a", **CONFIGS[name])
    adapter = read(tmp_path / "a", tiny)
    assert {tiny.module_path(*linear) for linear in adapter.linears} == set(deltas)
    pool = PagePool(tiny, 4 << 20, torch.float32)
    pool.pages.arena.fill_(torch.nan)
    slot = pool.insert(adapter)
    assert slot is not None
    for layer, site in tiny.linears():
        in_features, out_features = tiny.sites[site]
        x = torch.eye(in_features)
        y = torch.zeros(in_features, out_features)
        segments = build_segments([(in_features, ((slot, 1.0),))])
        lora_add(y, x, pool.pages, layer, (Site(SITES.index(site), 0, out_features),), segments)
        expected = deltas.get(tiny.module_path(layer, site), torch.zeros(out_features, in_features))
        torch.testing.assert_close(y.T, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_mixed_batch_gives_each_row_its_adapters(llama: LlamaForCausalLM, tiny: ModelLayout, tmp_path: Path) -> None:
    names = ["rank 1", "rank 40, rslora", "patterns"]
    weights = {"rank 1": 0.05, "rank 40, rslora": -0.002, "patterns": 0.01}
    token_ids = torch.arange(7 * 11).view(7, 11) % 89
    pool = PagePool(tiny, 4 << 20, torch.float32)
    slots, deltas = {}, {}
    for name in names:
        folder = tmp_path / name.replace(" ", "-").replace(",", "")
        deltas[name] = trained(llama, folder, **CONFIGS[name])
        slots[name] = pool.insert(read(folder, tiny))
    combos: list[tuple[str, ...]] = [(), (names[0],), (names[1],), (names[2],), (), (names[1], names[2]), tuple(names)]

    original = {
        path: module.weight.data.clone() for path, module in llama.named_modules() if isinstance(module, nn.Linear)
    }
    modules = dict(llama.named_modules())
    expected = []
    for row, combo in enumerate(combos):
        for name in combo:
            for path, delta in deltas[name].items():
                modules[path].weight.data += weights[name] * delta
        expected.append(llama(token_ids[row : row + 1]).logits[0])
        for path, weight in original.items():
            modules[path].weight.data.copy_(weight)

    held = [tuple((slots[name], weights[name]) for name in combo) for combo in combos]
    actual = served(llama, tiny, pool, token_ids, held)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)
    base = actual[0]
    assert not torch.allclose(actual[1], base) and not torch.allclose(actual[6], actual[5])
