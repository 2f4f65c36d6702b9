"""Folders in and out: bitsandbytes both ways bit for bit, shards, quantizing in flight, digests, refusals."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_shape import SHAPE
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorry.kernels.lora import SITES
from lorry.kernels.nf4 import quantize
from lorry.kernels.nf4_linear import NF4Linear
from lorry.server.errors import LorryError
from lorry.server.model import writer
from lorry.server.model.errors import MalformedCheckpoint, ModelNotFound, UnsupportedModel
from lorry.server.model.load import load_model, open_checkpoint, quantize_checkpoint
from lorry.server.model.readers.safetensors import SafetensorsCheckpoint
from lorry.server.model.weights import read_ends, read_layer

ODD = SHAPE | {"hidden_size": 90, "intermediate_size": 77, "num_attention_heads": 5}
PROMPTS = [list(range(40, 69)), [7, 3, 99]]
CHUNKS = [(17, 11), (3,)]


@pytest.fixture(scope="module")
def folder(tools: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit Qwen2 (it has biases), untied."""
    path = tmp_path_factory.mktemp("model") / "bf16"
    tools.tiny_model("qwen2", torch.bfloat16, **SHAPE).save_pretrained(path)
    return path


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(
    ("shape", "dtype", "double", "storage", "skip"),
    [
        (SHAPE, torch.bfloat16, True, torch.uint8, None),
        (SHAPE, torch.float32, False, torch.uint8, None),
        (SHAPE, torch.float16, True, torch.bfloat16, ["lm_head", "k_proj", "model.layers.1.mlp.up_proj"]),
        (ODD, torch.float32, True, torch.uint8, ["lm_head"]),
    ],
    ids=["double", "plain", "storage-bf16-skips", "odd"],
)
def test_reads_what_transformers_wrote(
    shape: dict[str, Any],
    dtype: torch.dtype,
    double: bool,
    storage: torch.dtype,
    skip: list[str] | None,
    tools: Any,
    tmp_path: Path,
) -> None:
    """Every quantized weight of our reader equals bitsandbytes' own state bit for bit, and the model runs."""
    tools.tiny_model("llama", dtype, **shape).save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "nf4")

    checkpoint = open_checkpoint(tmp_path / "nf4")
    read_ends(checkpoint)
    dense = 0
    for layer in range(2):
        for site, weight in read_layer(checkpoint, layer).linears.items():
            block = model.model.layers[layer]
            module = getattr(block.self_attn, site, None) or getattr(block.mlp, site)
            if isinstance(weight, Tensor):
                assert torch.equal(weight, module.weight)
                dense += 1
                continue
            state = module.weight.quant_state
            assert torch.equal(weight.packed, module.weight.data.view(torch.uint8).flatten())
            assert torch.equal(weight.absmax, state.absmax)
            assert torch.equal(weight.code, state.code)
            assert (weight.dtype, weight.shape, weight.blocksize) == (dtype, tuple(state.shape), 64)
            if double:
                assert weight.nested_absmax is not None and weight.nested_code is not None
                assert torch.equal(weight.nested_absmax, state.state2.absmax)
                assert torch.equal(weight.nested_code, state.state2.code)
                assert weight.nested_offset == state.offset.item()
            else:
                assert weight.nested_absmax is None
    checkpoint.close()
    assert dense == (3 if skip and len(skip) > 1 else 0)

    oracle = tools.tiny_model("llama", dtype, **shape).float()
    kept = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)] + ["model.layers.1.mlp.up_proj"] if dense else []
    with torch.no_grad():
        for name, module in oracle.named_modules():
            if name.split(".")[-1] in SITES and name not in kept:
                module.weight.copy_(tools.nf4_round(module.weight, double))
    actual = tools.paged_logits(load_model(str(tmp_path / "nf4")), PROMPTS, chunks=CHUNKS)
    for ours, theirs in zip(actual, tools.reference_logits(oracle, PROMPTS), strict=True):
        assert tools.relative_rms(ours, theirs) < 1e-4


@pytest.mark.parametrize("shard_bytes", [2**40, 150_000], ids=["one-file", "shards"])
def test_transformers_loads_what_we_write(
    shard_bytes: int, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", shard_bytes)
    tools.tiny_model("qwen3", torch.float32, **SHAPE, head_dim=64).save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "tokenizer.json").write_text("{}")
    stages: list[tuple[str, int, int]] = []
    target = quantize_checkpoint(
        str(tmp_path / "float"), tmp_path / "nf4", progress=lambda *stage: stages.append(stage)
    )
    assert stages[0] == ("quantize", 0, 2) and stages[-1] == ("quantize", 2, 2)
    assert (target / "model.safetensors.index.json").exists() == (shard_bytes == 150_000)
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not list(tmp_path.glob(".*"))

    model = AutoModelForCausalLM.from_pretrained(target).eval()
    source = load_file(tmp_path / "float" / "model.safetensors")
    for name, module in model.named_modules():
        if name.split(".")[-1] in SITES:
            assert type(module).__name__ == "Linear4bit"
            expected = quantize(source[f"{name}.weight"])
            assert torch.equal(module.weight.data.flatten(), expected.packed)
            assert torch.equal(module.weight.quant_state.absmax, expected.absmax)
        if name == "lm_head":
            assert type(module).__name__ == "Linear"
    actual = tools.paged_logits(load_model(str(target)), PROMPTS, chunks=CHUNKS)
    for ours, theirs in zip(actual, tools.reference_logits(model, PROMPTS), strict=True):
        assert tools.relative_rms(ours, theirs) < 1e-4
    with pytest.raises(FileExistsError):
        quantize_checkpoint(str(tmp_path / "float"), target)
    with pytest.raises(UnsupportedModel, match="already"):
        quantize_checkpoint(str(target), tmp_path / "again")


def test_shards_and_written_checkpoint_equal_quantizing_in_flight(folder: Path, tools: Any, tmp_path: Path) -> None:
    """Four ways to the same bits: one file, shards, in flight, through a written checkpoint."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "shards", max_shard_size="120KB"
    )
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    quantize_checkpoint(str(folder), tmp_path / "nf4")
    expected = tools.paged_logits(load_model(str(folder)), PROMPTS, chunks=CHUNKS)
    for other in (tmp_path / "shards", tmp_path / "nf4"):
        actual = tools.paged_logits(load_model(str(other)), PROMPTS, chunks=CHUNKS)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), other.name


def test_one_float_linear_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing in flight lets each 16-bit linear go before it reads the next."""
    given: list[weakref.ref[Tensor]] = []
    read = SafetensorsCheckpoint.linear

    def watched(self: SafetensorsCheckpoint, module: str, shape: tuple[int, int]) -> Any:
        assert sum(ref() is not None for ref in given) == 0
        weight = read(self, module, shape)
        if module != "lm_head" and isinstance(weight, Tensor):
            given.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(SafetensorsCheckpoint, "linear", watched)
    load_model(str(folder))
    assert len(given) == 2 * 7


def test_a_damaged_file_fails_its_digest(folder: Path, tmp_path: Path) -> None:
    target = quantize_checkpoint(str(folder), tmp_path / "nf4")
    load_model(str(target))
    raw = bytearray((target / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (target / "model.safetensors").write_bytes(raw)
    with pytest.raises(MalformedCheckpoint, match="damaged") as caught:
        load_model(str(target))
    assert caught.value.fields["field"] == "model.safetensors"
    (target / "config.json").unlink()
    with pytest.raises(LorryError):
        load_model(str(target))


def test_an_interrupted_write_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(folder), tmp_path / "nf4", progress=stop)
    assert list(tmp_path.iterdir()) == []


def edit(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda tensors: tensors.pop(UP), UP),
        (lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}), UP),
        (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": tensors[UP].clone()}), "layers.2"),
        (lambda tensors: tensors.update({UP: tensors[UP].to(torch.int32)}), UP),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(192)}), "o_proj.bias"),
        (lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias"),
    ],
    ids=["missing", "transposed", "extra-layer", "integers", "extra-bias", "missing-bias"],
)
def test_contradicting_tensors_are_named(change: Any, field: str, folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "broken")
    edit(broken, change)
    with pytest.raises(MalformedCheckpoint) as caught:
        load_model(str(broken))
    assert field in caught.value.fields["field"]


def test_redundant_tensors_are_welcome(tools: Any, tmp_path: Path) -> None:
    """A tied head stored once more, and the rotary frequencies of old checkpoints."""
    tools.tiny_model("llama", torch.float32, **SHAPE, tie_word_embeddings=True).save_pretrained(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)

    edit(tmp_path, add)
    assert load_model(str(tmp_path)).config.tie_embeddings


def test_truncated_file_is_named(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "broken")
    raw = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(MalformedCheckpoint, match=r"model\.safetensors"):
        load_model(str(broken))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("absmax", lambda tensor: tensor[:-1].clone()),
        ("absmax", lambda tensor: tensor.float()),
        ("nested_absmax", lambda tensor: torch.cat([tensor, tensor])),
        ("nested_quant_map", lambda tensor: tensor[:255].clone()),
        ("quant_map", lambda tensor: tensor[:15].clone()),
        ("quant_state.bitsandbytes__nf4", lambda tensor: tensor[:-1].clone()),
    ],
)
def test_contradicting_quantization_states_are_named(key: str, change: Any, folder: Path, tmp_path: Path) -> None:
    target = quantize_checkpoint(str(folder), tmp_path / "nf4")
    edit(target, lambda tensors: tensors.update({f"{UP}.{key}": change(tensors[f"{UP}.{key}"])}))
    (target / "digests.json").unlink()
    with pytest.raises(MalformedCheckpoint) as caught:
        load_model(str(target))
    assert caught.value.fields["field"].startswith(UP)


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    quantization: dict[str, Any], word: str, folder: Path, tmp_path: Path
) -> None:
    other = copy_of(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UnsupportedModel, match=word):
        load_model(str(other))


def test_pickles_and_strangers_are_not_read(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "other")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="safetensors"):
        load_model(str(other))
    (other / "config.json").write_text("{")
    with pytest.raises(MalformedCheckpoint, match=r"config\.json"):
        load_model(str(other))


def test_what_the_decoder_reports(folder: Path) -> None:
    decoder = load_model(str(folder))
    source = load_file(folder / "model.safetensors")
    assert decoder.parameters == sum(tensor.numel() for tensor in source.values())
    linears = sum(p.nf4_weights for p in decoder.projections)
    assert linears == sum(t.numel() for name, t in source.items() if name.split(".")[-2] in SITES and t.dim() == 2)
    pieces = [piece for p in decoder.projections for piece in p.pieces]
    parts = [part for piece in pieces if isinstance(piece, NF4Linear) for part in piece.parts]
    assert len(parts) == 2 * 7
    tensors = [t for part in parts for t in (part.packed, part.absmax, part.nested_absmax) if t is not None]
    held = sum(tensor.nbytes for tensor in tensors) + 256 * 4 + 16 * 4  # tables that all share
    assert decoder.bits_per_linear_weight == pytest.approx(8 * held / linears)
    biases = 2 * (192 + 64 + 64) * 4
    assert decoder.weight_bytes == held + biases + 2 * 131 * 192 * 2 + 5 * 192 * 4
    assert decoder.layout.sites["down_proj"] == (320, 192)
    assert decoder.layout.layers == 2
