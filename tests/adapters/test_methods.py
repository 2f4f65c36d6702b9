"""Every method of PEFT's LoRA family: a folder that PEFT wrote gives PeftModel's logits, in a batch with the others."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from random_adapters import NoBase
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers_with_pages import Base, layout_of, read, served, write

from lorry.adapters.device.pool import PagePool
from lorry.adapters.errors import MalformedAdapter, MixRefused, UnsupportedField, WrongBase
from lorry.adapters.layout import ModelLayout
from lorry.adapters.lease import Entry, Part
from lorry.adapters.library import unfit
from lorry.adapters.reading.checkpoint import LinearTensors
from lorry.adapters.reading.files import Place
from lorry.adapters.reading.methods import update_of
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.segments import Combo
from lorry.kernels.lora import SITES

ALL = list(SITES)
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ALL},
    "dora": {"r": 5, "target_modules": ALL, "use_dora": True},
    "dora-rslora-patterns": {
        "r": 6,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 33},
        "alpha_pattern": {"q_proj": 3},
    },
    "bias-all": {"r": 3, "target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "bias-lora-only": {"r": 3, "target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "dora-bias": {"r": 17, "target_modules": ["v_proj", "gate_proj"], "use_dora": True, "bias": "all"},
    "lora-bias": {"r": 8, "target_modules": ["k_proj", "o_proj", "down_proj"], "lora_bias": True},
    "fan-in": {"r": 4, "target_modules": ["v_proj"], "fan_in_fan_out": True},
    "pissa": {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"},
    "olora": {"r": 3, "target_modules": ["v_proj", "down_proj"], "init_lora_weights": "olora", "use_rslora": True},
    "dora-pissa": {"r": 4, "target_modules": ["o_proj"], "init_lora_weights": "pissa", "use_dora": True},
}


@pytest.fixture(scope="module")
def qwen() -> Qwen2ForCausalLM:
    """Two layers, every dimension another number, q, k and v with biases."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=89,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=12,
        initializer_range=0.15,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


@pytest.fixture(scope="module")
def layout(qwen: Qwen2ForCausalLM) -> ModelLayout:
    return layout_of(qwen)


@torch.no_grad()
def test_all_methods_in_one_batch_give_pefts_logits(
    qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path
) -> None:
    token_ids = torch.arange(11).repeat(len(CONFIGS) + 1, 1)
    pool = PagePool(layout, 8 << 20, torch.float32)
    pool.pages.arena.fill_(torch.nan)
    combos: list[Combo] = [()]
    expected = [qwen(token_ids[:1]).logits[0]]
    for name, config in CONFIGS.items():
        write(qwen, tmp_path / name, **config)
        slot = pool.insert(read(tmp_path / name, layout, Base(qwen)))
        assert slot is not None
        combos.append(((slot, 1.0),))
        oracle = peft.PeftModel.from_pretrained(copy.deepcopy(qwen), str(tmp_path / name)).eval()
        expected.append(oracle(token_ids[:1]).logits[0])
    actual = served(qwen, layout, pool, token_ids, combos)
    for row, name in enumerate(["base", *CONFIGS]):
        torch.testing.assert_close(
            actual[row], expected[row], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert row == 0 or (actual[row] - actual[0]).abs().max() > 0.05, f"{name} changes nothing"


@torch.no_grad()
def test_shifts_without_gains_can_be_mixed(qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path) -> None:
    pool = PagePool(layout, 8 << 20, torch.float32)
    slots, weights = [], (0.7, -1.5)
    summed = copy.deepcopy(qwen)
    modules = dict(summed.named_modules())
    for seed, weight in enumerate(weights):
        folder = tmp_path / str(seed)
        write(qwen, folder, seed=seed, r=4, target_modules=["q_proj", "o_proj"], lora_bias=True)
        adapter = read(folder, layout, Base(qwen))
        slots.append(pool.insert(adapter))
        tensors = load_file(folder / "adapter_model.safetensors")
        for linear, canonical in adapter.linears.items():
            path = layout.module_path(*linear)
            a, b, bias = (
                tensors[f"base_model.model.{path}.lora_{part}"] for part in ("A.weight", "B.weight", "B.bias")
            )
            module, scale = modules[path], weight * canonical.scaling
            module.weight.data += scale * b @ a
            module.bias = nn.Parameter(scale * bias + (0 if module.bias is None else module.bias.data))
    token_ids = torch.arange(9)[None]
    combo = tuple((slot, weight) for slot, weight in zip(slots, weights, strict=True) if slot is not None)
    actual = served(qwen, layout, pool, token_ids, [combo])
    torch.testing.assert_close(actual, summed(token_ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_has_converted_needs_no_base(
    qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path
) -> None:
    """path_initial_model_for_weight_conversion: an ordinary adapter of twice the rank over the original weights."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"
    )
    tuned = peft.get_peft_model(copy.deepcopy(qwen), config)
    tuned.save_pretrained(str(tmp_path / "initial"))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    token_ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = tuned.eval()(token_ids).logits
    tuned.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    adapter = read(tmp_path / "a", layout, NoBase())
    assert (adapter.rank, adapter.methods) == (8, ("lora",))
    pool = PagePool(layout, 8 << 20, torch.float32)
    slot = pool.insert(adapter)
    assert slot is not None
    torch.testing.assert_close(served(qwen, layout, pool, token_ids, [((slot, 1.0),)]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group", [4, 8, 40])
def test_qalora_is_pefts_pooling(group: int) -> None:
    """PEFT pools over GPTQ linears only, so its variant is asked without one."""
    generator = torch.Generator().manual_seed(group)
    a, b = torch.randn(3, 40 // group, generator=generator), torch.randn(7, 3, generator=generator)
    x, y = torch.randn(5, 40, generator=generator), torch.randn(5, 7, generator=generator)
    spec = AdapterSpec.from_json(
        {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "use_qalora": True}
        | {"qalora_group_size": group}
    )
    update = update_of((0, "q_proj"), "model.layers.0.self_attn.q_proj", LinearTensors(40, a, b), spec, NoBase())
    module = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=a)},
        lora_B={"x": SimpleNamespace(weight=b)},
        lora_dropout={"x": nn.Identity()},
        scaling={"x": 2.0},
        qalora_group_size={"x": group},
        training=False,
        in_features=40,
    )
    expected = QALoraLinearVariant.forward(module, active_adapter="x", x=x, result=y)
    assert update.a is not None and update.b is not None and update.vectors is None
    torch.testing.assert_close(y + update.scaling * (x @ update.a.T) @ update.b.T, expected)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj."
SPOILED: dict[str, tuple[str, Any, type[Exception], str]] = {
    "no magnitude": (
        "dora",
        lambda t: t.pop(Q0 + "lora_magnitude_vector"),
        MalformedAdapter,
        "lora_magnitude_vector is missing",
    ),
    "no bias of B": (
        "lora-bias",
        lambda t: t.pop(Q0.replace("q_proj", "k_proj") + "lora_B.bias"),
        MalformedAdapter,
        r"k_proj\.lora_B\.bias is missing",
    ),
    "long magnitude": (
        "dora",
        lambda t: t.update({Q0 + "lora_magnitude_vector": torch.ones(61)}),
        WrongBase,
        "this base needs",
    ),
    "infinite magnitude": (
        "dora",
        lambda t: t[Q0 + "lora_magnitude_vector"].fill_(torch.inf),
        MalformedAdapter,
        "NaN or infinity",
    ),
    "a bias where the base has none": (
        "bias-all",
        lambda t: t.update({Q0.replace("q_proj", "o_proj") + "bias": torch.ones(40)}),
        WrongBase,
        "this base has no bias there",
    ),
    "a bias of a linear without LoRA": (
        "bias-lora-only",
        lambda t: t.update({Q0.replace("q_proj", "k_proj") + "bias": torch.ones(12)}),
        MalformedAdapter,
        "whose bias the config does not mean",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_tensors_are_refused(qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path, case: str) -> None:
    config, spoil, error, message = SPOILED[case]
    write(qwen, tmp_path / "a", **CONFIGS[config])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    with pytest.raises(error, match=message):
        read(tmp_path / "a", layout, Base(qwen))


def test_the_largest_files_that_peft_writes_are_read(
    qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path
) -> None:
    """Of the greatest rank on every linear, with all that a method adds to A and B."""
    for name, more in {"a": {"use_dora": True}, "b": {"lora_bias": True}}.items():
        write(qwen, tmp_path / name, r=256, target_modules=ALL, bias="all", **more)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum(tensor.nbytes for tensor in tensors.values()) <= layout.max_weight_bytes()


def test_biases_that_peft_did_not_write_stay_the_bases(
    qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path
) -> None:
    write(qwen, tmp_path / "a", **CONFIGS["bias-all"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "bias" not in name}, file)
    assert all(linear.vectors is None for linear in read(tmp_path / "a", layout, NoBase()).linears.values())


@pytest.mark.parametrize(
    ("name", "additive"), [("dora", False), ("bias-all", False), ("lora-bias", True), ("pissa", True)]
)
def test_what_has_no_multiple_is_served_alone(
    qwen: Qwen2ForCausalLM, layout: ModelLayout, tmp_path: Path, name: str, additive: bool
) -> None:
    write(qwen, tmp_path / "a", **CONFIGS[name])
    version = Entry.at("a", Place(tmp_path / "a", (tmp_path,))).current
    version.describe(read(tmp_path / "a", layout, Base(qwen)))
    other = Entry.at("b", Place(tmp_path / "b", (tmp_path,))).current
    whole, part, more = Part(version, 1.0, None), Part(version, 0.5, None), Part(other, 1.0, None)
    assert unfit(whole, [whole]) is None
    for refused, parts in ((part, [part]), (whole, [whole, more])):
        error = unfit(refused, parts)
        assert error is None if additive else isinstance(error, MixRefused) and error.field == "adapters"


def test_twice_the_rank_must_be_served(qwen: Qwen2ForCausalLM, layout: ModelLayout) -> None:
    spec = AdapterSpec.from_json(
        {"peft_type": "LORA", "r": 129, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    )
    tensors = LinearTensors(40, torch.ones(129, 40), torch.ones(60, 129))
    with pytest.raises(UnsupportedField, match=r"twice the rank of model\.layers\.0\.self_attn\.q_proj, 258"):
        update_of((0, "q_proj"), "model.layers.0.self_attn.q_proj", tensors, spec, Base(qwen))
