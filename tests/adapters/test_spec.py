"""adapter_config.json: every field is served, without effect or refused by name; matching is PEFT's own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorry.adapters.errors import AdapterError, MalformedAdapter, UnsupportedField
from lorry.adapters.layout import ModelLayout
from lorry.adapters.reading import matching
from lorry.adapters.reading.fields import ACCEPTED, SERVED, WITH_ALORA, WITHOUT_EFFECT, refuse_beside_alora
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.targets import targets_of

BASE = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def spec(**config: Any) -> AdapterSpec:
    return AdapterSpec.from_bytes(json.dumps({**BASE, **config}).encode())


UNSUPPORTED = {
    "peft_type": ["LOHA", "ADALORA", "IA3", None, 3],
    "task_type": ["SEQ_CLS", "SEQ_2_SEQ_LM", 1],
    "modules_to_save": [["norm"], ["layers.0"], ["self_attn"]],
    "trainable_token_indices": [{"q_proj": [1]}, {"embed": [1]}],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "alora_invocation_tokens": [[7] * 1025],
    "megatron_config": [{"a": 1}],
    "layer_replication": [[[0, 2], [1, 3]]],
    "init_lora_weights": ["pissa_niter_16", "corda", "lora_ga", "PiSSA", "LoftQ", 1],
    "velora_config": [{"num_groups": 4}],
    "monteclora_config": [{"num_samples": 4}],
    "arrow_config": [{"top_k": 2}],
    "kasa_config": [{}],
    "use_bdlora": [{"nblocks": 2}],
    "a_field_of_tomorrow": [True, 1, 0, "x", ["x"], {"x": 1}],
    "r": [257, 4096],
    "target_modules": [[], None, ["q_proj", "model.norm"], ".*"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in UNSUPPORTED.items() for v in values], ids=str)
def test_refuses_by_name(layout: ModelLayout, name: str, value: object) -> None:
    with pytest.raises(UnsupportedField, match=name) as refused:
        targets_of(spec(**{name: value}), layout)
    assert refused.value.field == name


MALFORMED = {
    "r": [0, -1, 8.0, "8", True, None],
    "lora_alpha": ["16", None, True, 10**400],
    "use_rslora": [1, None, "true"],
    "use_dora": [1, "true"],
    "lora_bias": [1, "true"],
    "bias": [None, "some", True],
    "rank_pattern": [[], {"q_proj": 0}, {"q_proj": "4"}, {"q_proj": 1.5}],
    "alpha_pattern": [3, {"q_proj": None}, {"q_proj": True}],
    "target_modules": [5, {"q_proj": 1}, ["q_proj", 3], "q_proj("],
    "exclude_modules": [5, [None], "[", "(?P<a"],
    "modules_to_save": [5, "lm_head", [""], [None], ["q_proj("], ["x{4294967294}"]],
    "layers_to_transform": ["1", [1.5], [True], {"a": 1}],
    "layers_pattern": [5, "layers"],
    "alora_invocation_tokens": [[], 5, "5", [1, 1.0], [True], [3, -1], [None], {"a": 1}],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in MALFORMED.items() for v in values], ids=str)
def test_malformed_values_are_refused_by_name(layout: ModelLayout, name: str, value: object) -> None:
    with pytest.raises(MalformedAdapter) as refused:
        spec(**{name: value}).adapted_linears(layout)
    assert refused.value.field == name


@pytest.mark.parametrize("name", ["peft_type", "r", "target_modules"])
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(MalformedAdapter, match=f"{name} is missing"):
        AdapterSpec.from_json({key: value for key, value in BASE.items() if key != name})


def test_all_of_pefts_fields_are_known() -> None:
    fields = set(LoraConfig(task_type="CAUSAL_LM").to_dict())
    assert fields <= SERVED | WITHOUT_EFFECT | set(ACCEPTED) | {"init_lora_weights"}


def test_methods_that_pefts_refuses_to_combine_are_refused() -> None:
    for other in ("lora_bias", "use_qalora"):
        with pytest.raises(UnsupportedField, match=f"{other} and use_dora") as refused:
            spec(use_dora=True, **{other: True})
        assert refused.value.field == other


def test_loftq_of_one_iteration_trains_on_plain_nf4() -> None:
    assert spec(init_lora_weights="loftq").init == ""
    assert spec(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}).rank == 8
    with pytest.raises(UnsupportedField, match="'loftq' of one iteration") as refused:
        spec(init_lora_weights="loftq", loftq_config={"loftq_iter": 5})
    assert refused.value.field == "init_lora_weights"


def test_methods_are_named() -> None:
    assert spec().methods == ("lora",)
    assert spec(use_rslora=True, bias="all", use_dora=True).methods == ("rslora", "dora", "bias")
    assert spec(lora_bias=True, init_lora_weights="pissa").methods == ("lora", "lora_bias", "pissa")
    assert spec(use_qalora=True, qalora_group_size=4).methods == ("lora", "qalora")
    assert spec(use_dora=None, lora_bias=None, fan_in_fan_out=True, qalora_group_size=16).methods == ("lora",)


BESIDE_ALORA = {
    "bias": ["all", "lora_only"],
    "use_dora": [True],
    "use_qalora": [True],
    "modules_to_save": [["lm_head"]],
    "trainable_token_indices": [[3]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BESIDE_ALORA.items() for v in values], ids=str)
def test_what_changes_other_tokens_is_refused_beside_invocation_tokens(name: str, value: object) -> None:
    with pytest.raises(UnsupportedField, match=name) as refused:
        refuse_beside_alora({**BASE, name: value})
    assert refused.value.field == name
    with pytest.raises(UnsupportedField, match=name):
        spec(alora_invocation_tokens=[1], **{name: value})


def test_invocation_tokens() -> None:
    assert BESIDE_ALORA.keys() == WITH_ALORA.keys()
    read = spec(alora_invocation_tokens=[5, 0, 10**12], bias="none", use_dora=False)
    assert (read.invocation_tokens, read.methods) == ((5, 0, 10**12), ("lora", "alora"))
    assert spec(alora_invocation_tokens=[5], use_rslora=True).methods == ("rslora", "alora")
    assert spec(alora_invocation_tokens=None) == spec() and spec().methods == ("lora",)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_harmless_initialisations_pass(init: object) -> None:
    assert spec(init_lora_weights=init, eva_config={"rho": 2.0}).rank == 8


def test_what_peft_writes_by_default_passes() -> None:
    config = LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").to_dict()
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    read = AdapterSpec.from_bytes(json.dumps(written).encode())
    assert (read.rank, read.alpha, read.target_modules) == (5, 3.0, ("down_proj", "q_proj"))
    assert spec(a_field_of_tomorrow=None, another=[], third={}, fourth=False, fifth="") == spec()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"r": 1, "r": 2}', "appears twice"),
        (b'{"r": NaN}', "NaN is not a number"),
        (b'{"r": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b"[" * 200_000, "nested deeper"),
        (b"[]", "an object is expected"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"r": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b" " * ((1 << 20) + 1), "at most 1048576 are read"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hostile_json(content: bytes, message: str) -> None:
    with pytest.raises(MalformedAdapter, match=message):
        AdapterSpec.from_bytes(content)


def test_brackets_in_strings_are_not_nesting() -> None:
    assert spec(base_model_name_or_path='[[\\"{' * 50).base


@pytest.mark.parametrize("pattern", [r"(.|.|.)*(.|.|.)*\d", r"(?:.|.|.)*!|.*proj\d"])
def test_patterns_that_explode_are_stopped(layout: ModelLayout, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TIME_LIMIT", 0.2)
    with pytest.raises(MalformedAdapter, match="take longer") as refused:
        spec(target_modules=pattern).adapted_linears(layout)
    assert refused.value.field == "target_modules"
    with pytest.raises(MalformedAdapter, match="take longer") as refused:
        spec(modules_to_save=[pattern]).adapted_linears(layout)
    assert refused.value.field == "modules_to_save"


# ---------------------------------------------------------------- PEFT as the oracle

KEYS = [
    "q_proj",
    "self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    r"layers\.[02]\..*_proj",
    "^model.layers.0.mlp.up_proj",
    r".*\.1\..*",
    "proj",
    "[kv]_proj|o_proj",
    "layers.2.mlp.down_proj$",
]


@settings(deadline=None, max_examples=80)
@given(
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 256), max_size=4),
    alphas=st.dictionaries(st.sampled_from(KEYS), st.floats(-99, 99), max_size=4),
    rslora=st.booleans(),
)
def test_patterns_match_as_in_peft(
    layout: ModelLayout, ranks: dict[str, int], alphas: dict[str, float], rslora: bool
) -> None:
    read = spec(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    for linear in layout.linears():
        path = layout.module_path(*linear)
        rank = ranks.get(get_pattern_key(ranks.keys(), path), 8)
        alpha = alphas.get(get_pattern_key(alphas.keys(), path), 16)
        assert read.rank_of(path) == rank
        assert read.scaling_of(path) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


TARGETS = [
    ["q_proj"],
    ["q_proj", "model.layers.1.mlp.up_proj", "unknown"],
    ["self_attn.o_proj", "layers.2.self_attn.v_proj"],
    r".*\.(q|k)_proj",
    r"model\.layers\.[01]\.mlp\..*",
    "q_proj",
    r"(?i).*\.Q_PROJ",
    "model.layers.0.self_attn.q_proj|.*up_proj",
]
EXCLUDES = [None, [], ["q_proj"], ["model.layers.0.self_attn.q_proj"], r".*layers\.1\..*", "q_proj"]
LAYERS = [(None, None), (1, None), ([0, 2], None), ([], None), ([1], "layers"), ([0], ["h", "layers"]), ([1], "h")]


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("exclude", EXCLUDES, ids=str)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_match_as_in_peft(layout: ModelLayout, targets: Any, exclude: Any, layers: Any) -> None:
    fields = {"exclude_modules": exclude, "layers_to_transform": layers[0], "layers_pattern": layers[1]}
    try:
        config = LoraConfig(target_modules=targets, **fields)
    except ValueError:
        with pytest.raises(MalformedAdapter):
            spec(target_modules=targets, **fields)
        return
    read = spec(target_modules=targets, **fields)
    for linear in layout.linears():
        path = layout.module_path(*linear)
        assert read.adapts(path) == bool(check_target_module_exists(config, path)), path


@pytest.mark.parametrize("own", [["q_proj"], ["_proj"], ["model.layers.1.mlp"], ["self_attn", "up_proj"], ["q.proj"]])
def test_what_is_saved_whole_is_no_target_as_in_peft(layout: ModelLayout, own: list[str]) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "up_proj", "down_proj"], "modules_to_save": own}
    config, read = LoraConfig(**fields), spec(**fields)
    for linear in layout.linears():
        path = layout.module_path(*linear)
        assert read.adapts(path) == bool(check_target_module_exists(config, path)), path


def test_all_linear_is_every_linear_but_the_head(layout: ModelLayout) -> None:
    assert spec(target_modules="all-linear").adapted_linears(layout) == list(layout.linears())
    excluded = spec(target_modules="All-Linear", exclude_modules=["k_proj"]).adapted_linears(layout)
    assert excluded == [linear for linear in layout.linears() if linear[1] != "k_proj"]


def test_a_scaling_beyond_float32_is_refused() -> None:
    with pytest.raises(AdapterError, match="too large"):
        spec(lora_alpha=1e300).scaling_of("model.layers.0.self_attn.q_proj")
