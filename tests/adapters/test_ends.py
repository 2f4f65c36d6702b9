"""Adapters of the embedding, the head and whole modules: a folder that PEFT wrote gives PeftModel's logits."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers_with_pages import Base, layout_of, read, resident, served, write

from lorry.adapters.device.pool import PagePool
from lorry.adapters.errors import AdapterError, MalformedAdapter, WrongBase
from lorry.adapters.layout import ENDS
from lorry.adapters.reading.files import Place
from lorry.adapters.reading.report import report_on
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.targets import targets_of
from lorry.adapters.reading.tensor_file import MAX_HEADER_BYTES
from lorry.adapters.segments import Combo
from lorry.kernels.lora import SITES

FILE = "adapter_model.safetensors"
E, H = "base_model.model.model.embed_tokens.", "base_model.model.lm_head."

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "embedding": {"r": 5, "target_modules": ["embed_tokens", "v_proj"]},
    "head": {"r": 3, "target_modules": ["lm_head"], "use_rslora": True},
    "both": {"r": 4, "target_modules": ["lm_head", "embed_tokens"], "rank_pattern": {"lm_head": 19}},
    "dora": {"r": 3, "target_modules": ["lm_head", "embed_tokens", "o_proj"], "use_dora": True},
    "head-bias": {"r": 3, "target_modules": ["lm_head"], "lora_bias": True},
    "pissa": {"r": 3, "target_modules": ["embed_tokens", "k_proj"], "init_lora_weights": "pissa"},
    "own-embedding": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "own-head": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "own-both": {"r": 3, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "own-linears": {"r": 3, "target_modules": ["o_proj"], "modules_to_save": ["q_proj", "layers.1.mlp.down_proj"]},
    "tokens": {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [7, 88, 0]},
    "tokens-head": {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
    "tokens-many": {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": list(range(80, 3, -1))},
}
TIED: dict[str, dict[str, Any]] = {
    "tied-lora": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "tied-lora-of-head": {"r": 4, "target_modules": ["lm_head"]},
    "tied-own": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tied-own-head": {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
TOKENS_OF_BOTH = {"r": 3, "target_modules": ["q_proj"]}
CONFIGS |= {name: config | {"ensure_weight_tying": True} for name, config in TIED.items()}
CONFIGS["tokens-both"] = TOKENS_OF_BOTH | {"trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [9, 4]}}
CONFIGS["tokens-apart"] = TOKENS_OF_BOTH | {"trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [8]}}
# PEFT ties by names that end with an end's own, and by expressions that match that alone.
TYING = {"r": 3, "ensure_weight_tying": True}
CONFIGS["tying-by-path"] = TYING | {"target_modules": r"model\.embed_tokens|.*q_proj"}
CONFIGS["tying-by-name"] = TYING | {"target_modules": r".*(embed_tokens|q_proj)"}
CONFIGS["tying-by-part"] = TYING | {"target_modules": ["q_proj"], "modules_to_save": ["d_tokens"]}
CONFIGS["tying-part-of-head"] = TYING | {"target_modules": ["q_proj"], "modules_to_save": ["head"]}
CONFIGS["tying-own-of-target"] = TYING | {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
CONFIGS["tying-rank"] = TYING | {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 6}}
# What modules_to_save has is no target; with bias "all" PEFT saves its biases under three names.
CONFIGS["own-of-targets"] = {"r": 3, "target_modules": "all-linear", "modules_to_save": ["down_proj"]}
CONFIGS["own-biased"] = {"r": 3, "target_modules": ["o_proj"], "bias": "all", "modules_to_save": ["q_proj"]}


def model_of(tied: bool) -> Qwen2ForCausalLM:
    """Every dimension another number, q, k and v with biases."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=89,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=12,
        initializer_range=0.15,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> Qwen2ForCausalLM:
    return model_of(request.param)


def oracle(model: Qwen2ForCausalLM, folder: Path, token_ids: Tensor) -> Tensor:
    """PeftModel's logits [T, V] of the folder."""
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    logits: Tensor = tuned(token_ids).logits[0]
    return logits


@torch.no_grad()
def test_all_in_one_batch_give_pefts_logits(model: Qwen2ForCausalLM, tmp_path: Path) -> None:
    layout, token_ids = layout_of(model), torch.tensor([[7, 1, 88, 9, 4, 0, 33, 8]])
    pool = PagePool(layout, 16 << 20, torch.float32)
    pool.pages.arena.fill_(torch.nan)
    combos: list[Combo] = [()]
    expected = [model(token_ids).logits[0]]
    for name, config in CONFIGS.items():
        write(model, tmp_path / name, **config)
        combos.append(resident(pool, read(tmp_path / name, layout, Base(model))))
        expected.append(oracle(model, tmp_path / name, token_ids))
    actual = served(model, layout, pool, token_ids.repeat(len(combos), 1), combos)
    for row, name in enumerate(["base", *CONFIGS]):
        torch.testing.assert_close(
            actual[row], expected[row], rtol=2e-4, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert row == 0 or (actual[row] - actual[0]).abs().max() > 0.05, f"{name} changes nothing"


@torch.no_grad()
def test_factors_of_both_ends_can_be_mixed(tmp_path: Path) -> None:
    model = model_of(tied=False)
    layout, token_ids, weights = layout_of(model), torch.arange(9)[None], (0.7, -1.5)
    pool, summed, combo = PagePool(layout, 8 << 20, torch.float32), copy.deepcopy(model), list[tuple[int, float]]()
    for seed, weight in enumerate(weights):
        folder = tmp_path / str(seed)
        write(model, folder, seed=seed, r=4, target_modules=["embed_tokens", "lm_head"])
        combo += resident(pool, read(folder, layout, Base(model)), weight)
        own, scale = load_file(folder / FILE), 2 * weight  # lora_alpha is 8
        summed.model.embed_tokens.weight += scale * (own[E + "lora_embedding_B"] @ own[E + "lora_embedding_A"]).T
        summed.lm_head.weight += scale * own[H + "lora_B.weight"] @ own[H + "lora_A.weight"]
    actual = served(model, layout, pool, token_ids, [tuple(combo)])
    torch.testing.assert_close(actual, summed(token_ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("end", ["embed_tokens", "lm_head", "both"])
def test_matrices_that_peft_saves_along_are_loaded_over_the_base(tied: bool, end: str, tmp_path: Path) -> None:
    """save_embedding_layers: the base's own are none of the adapter's; others are what PEFT computes with."""
    model = model_of(tied)
    layout, token_ids = layout_of(model), torch.tensor([[7, 1, 88, 9]])
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    tuned.save_pretrained(str(tmp_path / "same"), save_embedding_layers=True)
    assert all(layer != ENDS for layer, _ in read(tmp_path / "same", layout, Base(model)).linears)

    tensors = load_file(tmp_path / "same" / FILE)
    names = [name for name in tensors if (name.endswith(f"{end}.weight") or end == "both") and "lora" not in name]
    assert len(names) == (2 if end == "both" else 1)
    changed = torch.randn(89, 40, generator=torch.Generator().manual_seed(1))
    kept = {name: tensor for name, tensor in tensors.items() if "lora" in name}
    save_file(kept | {name: changed.clone() for name in names}, tmp_path / "same" / FILE)
    adapter = read(tmp_path / "same", layout, Base(model))
    assert not adapter.additive
    pool = PagePool(layout, 8 << 20, torch.float32)
    actual = served(model, layout, pool, token_ids, [resident(pool, adapter)])[0]
    torch.testing.assert_close(actual, oracle(model, tmp_path / "same", token_ids), rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_small_changes_of_saved_matrices_are_not_dropped(end: str, tmp_path: Path) -> None:
    """One number of a row, which is nothing beside the matrix, and 0.3% of every number."""
    model = model_of(tied=False)
    layout, tuned = layout_of(model), peft.get_peft_model(model_of(False), peft.LoraConfig(target_modules=["q_proj"]))
    tuned.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    before = load_file(tmp_path / "a" / FILE)
    (name,) = (name for name in before if name.endswith(f"{end}.weight"))
    for dtype in (torch.bfloat16, torch.float16):
        save_file(before | {name: before[name].to(dtype)}, tmp_path / "a" / FILE)
        assert (ENDS, end) not in read(tmp_path / "a", layout, Base(model)).linears, "only rounded"
    row = before[name].clone()
    row[7, 3] += 0.01
    for changed in (row, before[name] * 1.003):
        save_file(before | {name: changed}, tmp_path / "a" / FILE)
        assert (ENDS, end) in read(tmp_path / "a", layout, Base(model)).linears


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_own_matrices_saved_beside_the_originals(tied: bool, tmp_path: Path) -> None:
    """save_embedding_layers writes the wrapper of modules_to_save whole."""
    model, token_ids = model_of(tied), torch.tensor([[7, 1, 88, 9]])
    write(model, tmp_path / "a", r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], saved=True)
    names = load_file(tmp_path / "a" / FILE).keys()
    assert {E + "weight", E + "modules_to_save.weight", E + "original_module.weight"} <= names
    layout = layout_of(model)
    pool = PagePool(layout, 8 << 20, torch.float32)
    combo = resident(pool, read(tmp_path / "a", layout, Base(model)))
    actual = served(model, layout, pool, token_ids, [combo])[0]
    torch.testing.assert_close(actual, oracle(model, tmp_path / "a", token_ids), rtol=2e-4, atol=2e-4)


def test_the_probe_takes_a_tied_heads_scale_from_the_config(tmp_path: Path) -> None:
    """Its factors are the embedding's, of rank 6; PEFT divides its alpha by the rank that the config gives the head."""
    model = model_of(tied=True)
    write(model, tmp_path / "a", **CONFIGS["tying-rank"])
    report = report_on(
        Place(tmp_path / "a", (tmp_path,)), layout_of(model), torch.float32, Base(model), lambda: "a fingerprint"
    )
    assert report.error is None
    assert report.probe is not None and report.probe.within and "lm_head" in report.probe.linears
    assert report.ranks == {3: 2, 6: 2}
    assert report.scalings == pytest.approx({8 / 3: 3, 8 / 6: 1})


SPOILED: dict[str, tuple[str, Any, type[AdapterError], str]] = {
    "a larger vocabulary": (
        "own-head",
        lambda t: t.update({H + "weight": torch.ones(91, 40)}),
        WrongBase,
        r"has shape \[91, 40\], this base needs \[89, 40\]",
    ),
    "a larger vocabulary of factors": (
        "embedding",
        lambda t: t.update({E + "lora_embedding_A": torch.ones(5, 91)}),
        WrongBase,
        r"has shape \[5, 91\], this base needs \[5, 89\]",
    ),
    "a larger vocabulary of the base's": (
        "lora",
        lambda t: t.update({E + "weight": torch.ones(91, 40)}),
        WrongBase,
        r"has shape \[91, 40\], this base needs \[89, 40\]",
    ),
    "another base under factors": (
        "embedding",
        lambda t: t[E + "base_layer.weight"].mul_(1.1),
        WrongBase,
        "model.embed_tokens beside what is added to it is not this base's",
    ),
    "no matrix": ("own-head", lambda t: t.pop(H + "weight"), MalformedAdapter, r"lm_head\.weight is missing"),
    "no rows": (
        "tokens",
        lambda t: t.pop(E + "token_adapter.trainable_tokens_delta"),
        MalformedAdapter,
        "trainable_tokens_delta is missing",
    ),
    "fewer rows": (
        "tokens",
        lambda t: t.update({E + "token_adapter.trainable_tokens_delta": torch.ones(2, 40)}),
        MalformedAdapter,
        r"has shape \[2, 40\], the config asks for \[3, 40\]",
    ),
    "rows that nothing means": (
        "lora",
        lambda t: t.update({H + "token_adapter.trainable_tokens_delta": torch.ones(3, 40)}),
        MalformedAdapter,
        "trainable_token_indices does not mean",
    ),
    "a matrix that nothing means": (
        "lora",
        lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(56, 40)}),
        MalformedAdapter,
        "modules_to_save does not mean",
    ),
    "an infinite matrix": ("own-head", lambda t: t[H + "weight"].fill_(torch.inf), MalformedAdapter, "NaN or infinity"),
    "no bias of an own linear": (
        "own-linears",
        lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.bias"),
        WrongBase,
        "this base has a bias there",
    ),
    "a bias of the head": (
        "own-head",
        lambda t: t.update({H + "bias": torch.ones(89)}),
        WrongBase,
        "has no bias there",
    ),
    "two of an own matrix": (
        "own-head",
        lambda t: t.update({H + "modules_to_save.weight": t[H + "weight"] + 1}),
        MalformedAdapter,
        "are the same tensor",
    ),
    "an original that nothing replaces": (
        "lora",
        lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.original_module.bias": torch.ones(60)}),
        MalformedAdapter,
        "modules_to_save does not mean",
    ),
    "a saved head that is not the embedding it is tied to": (
        "lora",
        lambda t: t.update({E + "weight": torch.ones(89, 40), H + "weight": torch.zeros(89, 40)}),
        MalformedAdapter,
        "which it is tied to",
    ),
    "another head than the embedding it is tied to": (
        "tied-own",
        lambda t: t.update({H + "weight": torch.ones(89, 40)}),
        MalformedAdapter,
        "which it is tied to",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_tensors_are_refused(case: str, tmp_path: Path) -> None:
    config, spoil, error, message = SPOILED[case]
    model = model_of(tied="tied" in case)
    write(model, tmp_path / "a", **CONFIGS[config])
    tensors = load_file(tmp_path / "a" / FILE)
    spoil(tensors)
    save_file(tensors, tmp_path / "a" / FILE)
    with pytest.raises(error, match=message):
        read(tmp_path / "a", layout_of(model), Base(model))


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a norm": ({"modules_to_save": ["norm"]}, "modules_to_save", "means model.norm"),
    "a layer's norm": ({"modules_to_save": ["input_layernorm"]}, "modules_to_save", "input_layernorm"),
    "both, by a part of a name": (
        {"modules_to_save": ["d_tokens"], "target_modules": ["embed_tokens"]},
        "modules_to_save",
        "both mean",
    ),
    "rows by two names": (
        {"trainable_token_indices": {"embed_tokens": [9, 4], "model.embed_tokens": [5, 6]}},
        "trainable_token_indices",
        "names model.embed_tokens twice",
    ),
    "rows and factors": (
        {"trainable_token_indices": [1], "target_modules": ["embed_tokens"]},
        "trainable_token_indices",
        "both mean",
    ),
    "rows and a matrix": (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        "trainable_token_indices",
        "both mean",
    ),
    "rows of a linear": ({"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices", "'q_proj'"),
    "a token twice": ({"trainable_token_indices": [1, 2, 1]}, "trainable_token_indices", "twice"),
    "a token beyond": ({"trainable_token_indices": [89]}, "trainable_token_indices", "token 89, this base has 89"),
    "no token": ({"trainable_token_indices": [-1]}, "trainable_token_indices", "a list of token ids"),
    "an embedding beside aLoRA": (
        {"target_modules": ["embed_tokens"], "alora_invocation_tokens": [1]},
        "alora_invocation_tokens",
        "embed_tokens",
    ),
    "a matrix beside aLoRA": (
        {"modules_to_save": ["lm_head"], "alora_invocation_tokens": [1]},
        "modules_to_save",
        "beside alora_invocation_tokens",
    ),
    "a bias of an embedding's B": (
        {"target_modules": ["embed_tokens"], "lora_bias": True},
        "lora_bias",
        "embed_tokens",
    ),
    "LoftQ of a head": ({"target_modules": ["lm_head"], "init_lora_weights": "loftq"}, "init_lora_weights", "lm_head"),
    "PiSSA of a head": ({"target_modules": ["lm_head"], "init_lora_weights": "pissa"}, "init_lora_weights", "lm_head"),
    "tied DoRA": (
        {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True},
        "ensure_weight_tying",
        "embed_tokens",
    ),
    "tied rows that differ": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "trainable_token_indices",
        "different tokens",
    ),
    "no name": ({"modules_to_save": "lm_head"}, "modules_to_save", "a list of names"),
    "all modules": ({"target_modules": ".*"}, "target_modules", "means model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_are_refused_by_name(case: str) -> None:
    changes, name, message = REFUSED[case]
    config = {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]} | changes
    with pytest.raises(AdapterError, match=message) as caught:
        targets_of(AdapterSpec.from_json(config), layout_of(model_of(tied=True)))
    assert caught.value.field == name


@pytest.mark.parametrize(("name", "additive"), [("both", True), ("own-head", False), ("tokens", False)])
def test_what_replaces_has_no_multiple(name: str, additive: bool, tmp_path: Path) -> None:
    model = model_of(tied=False)
    write(model, tmp_path / "a", **CONFIGS[name])
    assert read(tmp_path / "a", layout_of(model), Base(model)).additive is additive


def test_names_of_older_files(tmp_path: Path) -> None:
    """PEFT has written the names of its own modules into keys at times."""
    model = model_of(tied=False)
    for name, key in {
        "own-both": (r"(embed_tokens|lm_head)\.weight", r"\1.modules_to_save.default.weight"),
        "embedding": (r"(lora_embedding_[AB])$", r"\1.default"),
        "tokens": (r"(trainable_tokens_delta)$", r"\1.default"),
    }.items():
        write(model, tmp_path / name, **CONFIGS[name])
        before = read(tmp_path / name, layout_of(model), Base(model))
        renamed = {re.sub(*key, k): v for k, v in load_file(tmp_path / name / FILE).items()}
        assert renamed.keys() != load_file(tmp_path / name / FILE).keys()
        save_file(renamed, tmp_path / name / FILE)
        after = read(tmp_path / name, layout_of(model), Base(model))
        assert before.linears.keys() == after.linears.keys()
        assert all(torch.equal(before.linears[key].pages, after.linears[key].pages) for key in before.linears)


def test_the_largest_files_are_read(tmp_path: Path) -> None:
    model = model_of(tied=False)
    write(model, tmp_path / "a", r=256, target_modules=[*SITES, "embed_tokens", "lm_head"], use_dora=True, bias="all")
    write(model, tmp_path / "b", r=256, target_modules=list(SITES), modules_to_save=["embed_tokens", "lm_head"])
    for name in "ab":
        assert (tmp_path / name / FILE).stat().st_size <= layout_of(model).max_weight_bytes() + MAX_HEADER_BYTES
        read(tmp_path / name, layout_of(model), Base(model))
