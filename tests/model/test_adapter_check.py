"""`lorry adapters check`: what it says of adapters that PEFT wrote, of spoiled ones, and of a server gone wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorry.adapters.reading.identity import FINGERPRINT_KEY
from lorry.adapters.reading.spec import AdapterSpec
from lorry.server.cli import app
from lorry.server.model.adapter_check import AdapterCheck
from lorry.server.model.load import base_fingerprint

SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"alpha_pattern": {"layers.1.*proj": 5}, "rank_pattern": {"k_proj": 17}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "v_proj"]},
    "trainable_tokens": {"trainable_token_indices": {"embed_tokens": [3, 130], "lm_head": [1]}},
}
ENDS: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "ends-dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
}


@pytest.fixture(scope="module")
def model(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit Qwen2: its q, k and v have biases."""
    path = tmp_path_factory.mktemp("check") / "model"
    tools.tiny_model("qwen2", torch.bfloat16, **SHAPE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(tools: Any, model: Path) -> Path:
    for seed, (name, config) in enumerate((METHODS | ENDS).items()):
        torch.manual_seed(seed)
        values = {"target_modules": ["q_proj", "k_proj", "down_proj"], "init_lora_weights": False, **config}
        peft = get_peft_model(
            tools.tiny_model("qwen2", torch.float32, **SHAPE), LoraConfig(r=5, lora_alpha=8, **values)
        )
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_()
        peft.save_pretrained(model.parent / name)
    return model.parent


@pytest.fixture(scope="module")
def base(model: Path) -> AdapterCheck:
    return AdapterCheck(str(model))


@pytest.fixture
def lora(adapters: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter."""
    return Path(shutil.copytree(adapters / "lora", tmp_path / "lora"))


@pytest.mark.parametrize("name", ENDS)
def test_the_ends_are_probed(adapters: Path, base: AdapterCheck, name: str) -> None:
    report = base.report(adapters / name, "float32")
    assert report.error is None and report.probe is not None
    assert {"model.embed_tokens", "lm_head"} <= set(report.probe.linears)
    assert report.probe.rms_error < 1e-5 and report.modules["lm_head"] == report.modules["embed_tokens"] == [-1]
    tensors = load_file(adapters / name / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors


@pytest.mark.parametrize("name", METHODS)
def test_the_probe_agrees_with_the_files(adapters: Path, base: AdapterCheck, name: str) -> None:
    report = base.report(adapters / name, "float32")
    assert report.error is None and report.probe is not None
    assert name in report.methods
    assert report.probe.rms_error < 1e-5 and len(report.probe.linears) == 5
    for dtype, least in {"int8": 1e-3, "fp8": 1e-2}.items():
        narrow = base.report(adapters / name, dtype)
        assert narrow.error is None and narrow.probe is not None and narrow.probe.rms_error < 1e-5
        assert narrow.rounding is not None and least < narrow.rounding.error <= narrow.rounding.worst < 7e-2
    rounded = base.report(adapters / name).probe
    assert rounded is not None and rounded.within and rounded.rms_error > report.probe.rms_error


def test_what_8_bits_cost_is_no_refusal(lora: Path, base: AdapterCheck) -> None:
    """Ranks that nearly cancel, as those of a converted PiSSA do, lose almost all of their difference; a server serves
    them so."""
    tensors = load_file(lora / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        a[1:], b[:, 1:] = a[0], 0
        b[:, 1] = -b[:, 0] + 1e-3 * torch.randn(len(b), generator=torch.Generator().manual_seed(len(b)))
    save_file(tensors, lora / "adapter_model.safetensors")
    report = base.report(lora, "int8")
    assert report.error is None and report.probe is not None and report.probe.within
    assert report.rounding is not None and report.rounding.worst > 0.5


def test_the_report_counts(adapters: Path, base: AdapterCheck) -> None:
    report = base.report(adapters / "lora")
    assert report.modules == {"q_proj": [0, 1, 2], "k_proj": [0, 1, 2], "down_proj": [0, 1, 2]}
    assert report.ranks == {5: 6, 17: 3}
    assert report.scalings == {5 / 17: 1, 8 / 17: 2, 1.0: 2, 8 / 5: 4}
    assert (report.pages, report.bytes) == (12, 2 * 16 * (3 * (96 + 96) + 6 * (96 + 32) + 3 * (160 + 96)))
    assert len(report.revision) == 64 and report.as_json()["refused"] is False


def test_a_wrong_scale_is_found(adapters: Path, base: AdapterCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterSpec, "scaling_of", lambda spec, path: spec.alpha / spec.rank_of(path))
    error = base.report(adapters / "rslora").error
    assert error is not None and "differs from the reference" in error.message


def test_numbers_that_overflow_are_found(lora: Path, base: AdapterCheck) -> None:
    weights = lora / "adapter_model.safetensors"
    save_file({name: tensor * 1e25 for name, tensor in load_file(weights).items()}, weights)
    report = base.report(lora)
    assert report.refused and json.dumps(report.as_json(), allow_nan=False)


def test_methods_without_a_reference_are_not_probed(lora: Path, base: AdapterCheck) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "olora"}))
    report = base.report(lora)
    assert report.error is None and report.probe is None


def test_the_fingerprint_is_compared(lora: Path, model: Path, base: AdapterCheck) -> None:
    weights = lora / "adapter_model.safetensors"
    assert "does not say which quantized base" in base.report(lora).warnings[0]
    for name, agrees in ((base_fingerprint(model), True), ("0" * 64, False)):
        save_file(load_file(weights), weights, metadata={FINGERPRINT_KEY: name})
        report = base.report(lora)
        assert (report.fingerprint, report.base_fingerprint) == (name, base_fingerprint(model))
        assert report.refused is not agrees and report.warnings == []
        assert report.error is None or report.error.field == FINGERPRINT_KEY


def test_a_config_alone_is_enough_for_shapes(lora: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    shutil.copy(model / "config.json", tmp_path / "shape")
    weights = lora / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={FINGERPRINT_KEY: "0" * 64})
    assert not AdapterCheck(str(tmp_path / "shape")).report(lora).refused


def test_the_command(lora: Path, adapters: Path, model: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["adapters", "check", str(lora), "-m", str(model)])
    assert good.exit_code == 0
    assert f"{lora}: ok" in good.stdout
    for line in (
        "  methods   lora\n",
        "  modules   q_proj, k_proj, down_proj × 3 layers (9 linears)\n",
        "  rank      5 (6 linears), 17 (3 linears)\n",
        "  probe     5 linears, error at most ",
        "  warning   it does not say which quantized base it was trained on",
    ):
        assert line in good.stdout

    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "a_field\nof tomorrow": True}))
    both = runner.invoke(app, ["adapters", "check", str(lora), str(adapters / "dora"), "--model", str(model)])
    assert both.exit_code == 1
    assert f"{lora}: refused\n  why       a_field\\nof tomorrow is True" in both.stdout
    assert f"{adapters / 'dora'}: ok" in both.stdout

    as_json = runner.invoke(
        app, ["adapters", "check", str(tmp_path), str(adapters / "bias"), "--json", "-m", str(model)]
    )
    refused, fine = map(json.loads, as_json.stdout.splitlines())
    assert as_json.exit_code == 1
    assert refused["error"] == {
        "kind": "MalformedAdapter",
        "field": "adapter_config.json",
        "message": "the folder has no adapter_config.json",
    }
    assert (fine["refused"], fine["methods"], fine["probe"]["within"]) == (False, ["lora", "bias"], True)
    assert runner.invoke(app, ["adapters", "check", str(lora), "-m", str(tmp_path / "none")]).exit_code == 1
