"""One name for the same 4-bit weights, whoever wrote or read them, and another for any other."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_shape import SHAPE
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorry.kernels.nf4 import quantize
from lorry.server.model import fingerprint as room
from lorry.server.model.fingerprint import FINGERPRINT_NAME, fingerprint
from lorry.server.model.load import base_fingerprint, load_model, open_checkpoint, quantize_checkpoint

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "bf16"
    tools.tiny_model("llama", torch.bfloat16, **SHAPE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Path:
    """What transformers and bitsandbytes save of it, one linear of each layer skipped."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "k_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder.parent / "nf4")
    return folder.parent / "nf4"


def from_the_files(folder: Path) -> str:
    """The docstring's definition, over the tensors as they lie in the folder."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    lines = hashlib.sha256()
    sites = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    sites += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{layer}.{site}" for layer in range(config["num_hidden_layers"]) for site in sites]
    for name in [*names, *([] if config["tie_word_embeddings"] else ["lm_head"])]:
        packed = tensors[f"{name}.weight"]
        raw = tensors.get(f"{name}.weight.quant_state.bitsandbytes__nf4")
        if raw is None:
            lines.update(f"{name} {packed.shape[0]} {packed.shape[1]} dense\n".encode())
            continue
        state = json.loads(bytes(raw.tolist()))
        content = packed.numpy().tobytes() + tensors[f"{name}.weight.absmax"].numpy().tobytes()
        if "nested_offset" in state:
            content += tensors[f"{name}.weight.nested_absmax"].numpy().tobytes()
            content += tensors[f"{name}.weight.nested_quant_map"].numpy().tobytes()
            content += struct.pack("<f", state["nested_offset"])
        content += tensors[f"{name}.weight.quant_map"].numpy().tobytes()
        rows, columns = state["shape"]
        kind = f"nf4 {state['blocksize']} {state.get('nested_blocksize', 0)}"
        lines.update(f"{name} {rows} {columns} {kind} {hashlib.sha256(content).hexdigest()}\n".encode())
    return lines.hexdigest()


def test_is_what_the_docstring_says(theirs: Path, smollm2_folder: Path) -> None:
    assert fingerprint(open_checkpoint(theirs)) == from_the_files(theirs) == base_fingerprint(theirs)
    assert (smollm2_folder / FINGERPRINT_NAME).read_text().strip() == from_the_files(smollm2_folder)


def test_readers_agree(folder: Path, tmp_path: Path) -> None:
    """Quantized by bitsandbytes, in flight, and through a written checkpoint: the same bits under the same name."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours = quantize_checkpoint(str(folder), tmp_path / "ours")
    names = {load_model(str(path)).fingerprint for path in (folder, tmp_path / "theirs", ours)}
    assert names == {(ours / FINGERPRINT_NAME).read_text().strip()} and len(names.pop()) == 64
    assert load_model(str(folder), load_format="dummy").fingerprint == ""


def test_a_small_backlog_changes_nothing(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint(open_checkpoint(theirs))
    monkeypatch.setattr(room, "_BACKLOG_BYTES", 1)
    assert fingerprint(open_checkpoint(theirs)) == expected


Edit = Callable[[dict[str, Tensor]], object]


def edit_state(name: str, **changes: Any) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        key = f"{name}.weight.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[key].tolist())), **changes}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


def skip(name: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.weight")]:
            del tensors[key]
        tensors[f"{name}.weight"] = torch.ones(320, 192)

    return edit


def flip(name: str, at: int) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.uint8).view(-1)[at] ^= 1

    return edit


OTHERS: dict[str, Edit] = {
    "a code": flip(f"{UP}.weight", 77),
    "an absmax": flip(f"{UP}.weight.absmax", 5),
    "a nested absmax": flip(f"{UP}.weight.nested_absmax", 2),
    "the table": flip(f"{UP}.weight.quant_map", 9),
    "the nested table": flip(f"{UP}.weight.nested_quant_map", 99),
    "the offset": edit_state(UP, nested_offset=0.25),
    "a skipped module": skip(UP),
    "two modules' places": lambda t: [
        t.update({a: t[b], b: t[a]})
        for rest in ("", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4")
        for a, b in [(f"model.layers.{layer}.mlp.gate_proj.weight{rest}", f"{UP}.weight{rest}") for layer in [1]]
    ],
}
SAME: dict[str, Edit] = {
    "nothing": lambda tensors: None,
    "a norm": flip("model.norm.weight", 3),
    "an embedding": flip("model.embed_tokens.weight", 3),
    "what it dequantizes to": edit_state(UP, dtype="float16"),
}


@pytest.mark.parametrize("case", [*OTHERS, *SAME])
def test_what_makes_another_base(theirs: Path, tmp_path: Path, case: str) -> None:
    tensors = load_file(theirs / "model.safetensors")
    (OTHERS | SAME)[case](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((theirs / "config.json").read_text())
    assert (base_fingerprint(tmp_path) == base_fingerprint(theirs)) == (case in SAME)


def test_the_offset_of_a_conversion_does_not_hang_on_the_order_of_a_sum() -> None:
    weight = torch.randn(257, 512, generator=torch.Generator().manual_seed(0))
    exact = quantize(weight, tables_in=torch.float64)
    absmax = weight.view(-1, 64).abs().amax(dim=1)
    assert exact.nested_offset == float((absmax.double().flip(0).cumsum(0)[-1] / absmax.numel()).float())
