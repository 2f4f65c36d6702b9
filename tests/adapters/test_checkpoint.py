"""Files from strangers: every tensor used, shapes and values checked, nothing mapped, nothing unpickled."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import NoBase
from torch import Tensor

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.catalog import Catalog
from lorry.adapters.errors import AdapterError, MalformedAdapter, PathRefused, UnsupportedField, WrongBase
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading.files import revision_of
from lorry.adapters.reading.tensor_file import is_finite
from lorry.kernels.lora import PAGE_RANK

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
Edit = Callable[[dict[str, Tensor]], object]


def load(folder: Path, layout: ModelLayout, dtype: torch.dtype = torch.float32) -> CanonicalAdapter:
    place = Catalog(folder.parent).find(folder.name)
    assert place is not None
    return load_adapter(place, layout, dtype, NoBase())


def rename(change: Callable[[str], str]) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 15, 16, 17, 40])
def test_pages_hold_the_tensors(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path, rank: int, dtype: torch.dtype
) -> None:
    sites = ("k_proj", "down_proj", "up_proj")
    tensors = write_adapter(tmp_path / "a", sites=sites, rank=rank, dtype=dtype)
    adapter = load(tmp_path / "a", layout)
    assert (adapter.rank, adapter.target_modules, adapter.methods) == (
        rank,
        ("k_proj", "up_proj", "down_proj"),
        ("lora",),
    )
    assert len(adapter.linears) == 9
    for (layer, site), linear in adapter.linears.items():
        in_features, out_features = layout.sites[site]
        pages = linear.pages
        assert pages.shape == (-(-rank // PAGE_RANK), PAGE_RANK * (in_features + out_features))
        a = pages[:, : PAGE_RANK * in_features].reshape(-1, in_features)
        b = pages[:, PAGE_RANK * in_features :].reshape(-1, out_features)
        name = f"base_model.model.{layout.module_path(layer, site)}.lora_"
        assert torch.equal(a[:rank], tensors[name + "A.weight"].float())
        assert torch.equal(b[:rank].T, tensors[name + "B.weight"].float())
        assert not a[rank:].any() and not b[rank:].any()
        assert linear.scaling == 2.0


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
    ids=["without prefix", "with the adapter's name"],
)
def test_other_writers_names(layout: ModelLayout, write_adapter: Any, tmp_path: Path, change: Any) -> None:
    write_adapter(tmp_path / "a", edit=rename(change))
    write_adapter(tmp_path / "b")
    ours, plain = load(tmp_path / "a", layout), load(tmp_path / "b", layout)
    assert all(torch.equal(ours.linears[key].pages, plain.linears[key].pages) for key in plain.linears)
    assert ours.revision != plain.revision


def put(name: str, tensor: Tensor) -> Edit:
    return lambda tensors: tensors.update({name: tensor})


def spoil(value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[Q0 + "B.weight"][3, 5] = value

    return edit


HOSTILE: dict[str, tuple[Edit, type[AdapterError], str]] = {
    "missing B": (lambda t: t.pop(Q0 + "B.weight"), MalformedAdapter, "layers.0.self_attn.q_proj.lora_B is missing"),
    "missing A": (lambda t: t.pop(Q0 + "A.weight"), MalformedAdapter, "layers.0.self_attn.q_proj.lora_A is missing"),
    "nothing": (lambda t: t.clear(), MalformedAdapter, "is missing"),
    "extra tensor": (put("surplus", torch.ones(1)), MalformedAdapter, "'surplus'"),
    "dora": (
        put(Q0.replace("lora_", "lora_magnitude_vector"), torch.ones(43)),
        MalformedAdapter,
        "lora_magnitude_vector needs use_dora to be true",
    ),
    "embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(8, 9)),
        MalformedAdapter,
        "lora_embedding_A",
    ),
    "head": (put("base_model.model.lm_head.lora_A.weight", torch.ones(8, 37)), MalformedAdapter, "lm_head"),
    "bias of B": (put(Q0 + "B.bias", torch.ones(43)), MalformedAdapter, "lora_B.bias needs lora_bias to be true"),
    "bias": (
        put(Q0.replace("lora_", "bias"), torch.ones(43)),
        MalformedAdapter,
        'needs bias to be "all" or "lora_only"',
    ),
    "not a target": (
        lambda t: [
            t.update({n.replace("q_proj", "k_proj"): torch.ones(s)})
            for n, s in [(Q0 + "A.weight", (8, 37)), (Q0 + "B.weight", (13, 8))]
        ],
        MalformedAdapter,
        "target_modules does not mean",
    ),
    "another prefix": (
        rename(lambda n: n.replace("model.model.", "model.language_model.")),
        MalformedAdapter,
        "no rule",
    ),
    "doubled prefix": (rename(lambda n: n.replace("model.model.", "model.model.model.")), MalformedAdapter, "no rule"),
    "another name": (rename(lambda n: n.replace(".weight", ".mine.weight")), MalformedAdapter, "no rule"),
    "zero-led layer": (rename(lambda n: n.replace("layers.0", "layers.00")), MalformedAdapter, "no rule"),
    "wrong block": (rename(lambda n: n.replace("self_attn", "mlp")), MalformedAdapter, "no rule"),
    "named twice": (
        put(Q0.removeprefix("base_model.model.") + "A.weight", torch.ones(8, 37)),
        MalformedAdapter,
        "are the same tensor",
    ),
    "layer beyond": (rename(lambda n: n.replace("layers.2", "layers.3")), WrongBase, "this base has 3 layers"),
    "wrong rank of A": (put(Q0 + "A.weight", torch.ones(7, 37)), MalformedAdapter, r"\[7, 37\]"),
    "wrong rank of B": (put(Q0 + "B.weight", torch.ones(43, 9)), MalformedAdapter, r"\[43, 9\]"),
    "transposed A": (put(Q0 + "A.weight", torch.ones(37, 8)), MalformedAdapter, r"\[37, 8\]"),
    "three axes": (put(Q0 + "A.weight", torch.ones(8, 37, 1)), MalformedAdapter, r"\[8, 37, 1\]"),
    "other inputs": (put(Q0 + "A.weight", torch.ones(8, 39)), WrongBase, r"\[8, 39\].*needs \[8, 37\]"),
    "other outputs": (put(Q0 + "B.weight", torch.ones(41, 8)), WrongBase, r"needs \[43, 8\]"),
    "NaN": (spoil(float("nan")), MalformedAdapter, "q_proj.lora_B.weight holds NaN"),
    "infinity": (spoil(float("-inf")), MalformedAdapter, "q_proj.lora_B.weight holds NaN or infinity"),
    "float64": (put(Q0 + "A.weight", torch.ones(8, 37, dtype=torch.float64)), MalformedAdapter, "F64"),
    "int8": (put(Q0 + "A.weight", torch.ones(8, 37, dtype=torch.int8)), MalformedAdapter, "I8"),
    "empty tensor": (put(Q0 + "A.weight", torch.ones(0, 37)), MalformedAdapter, "empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(layout: ModelLayout, write_adapter: Any, tmp_path: Path, case: str) -> None:
    edit, error, message = HOSTILE[case]
    write_adapter(tmp_path / "a", edit=edit)
    with pytest.raises(error, match=message):
        load(tmp_path / "a", layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_is_what_torch_says(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    finite = torch.tensor([0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -1.5], dtype=dtype)
    assert bool(finite.isfinite().all()) and is_finite(finite)
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        assert not is_finite(torch.cat([finite, torch.tensor([value], dtype=dtype)]))


def test_the_base_is_named_by_its_hub_id_only(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    for base, shown in (("some-org/Base-1B", True), ("/home/someone/base", False)):
        edit = put(Q0 + "A.weight", torch.ones(8, 39))
        write_adapter(tmp_path / "a", edit=edit, base_model_name_or_path=base)
        with pytest.raises(WrongBase) as refused:
            load(tmp_path / "a", layout)
        assert (base in refused.value.message) is shown


def test_values_that_the_pool_cannot_hold(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", edit=spoil(7e4))
    with pytest.raises(MalformedAdapter, match="too large for the pool's float16"):
        load(tmp_path / "a", layout, torch.float16)
    assert load(tmp_path / "a", layout, torch.bfloat16).rank == 8


def test_patterns_give_each_module_its_rank(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[Q0 + "A.weight"], tensors[Q0 + "B.weight"] = torch.ones(20, 37), torch.ones(43, 20)

    write_adapter(
        tmp_path / "a", edit=edit, rank_pattern={"layers.0.self_attn.q_proj": 20}, alpha_pattern={"v_proj": 3}
    )
    adapter = load(tmp_path / "a", layout)
    assert adapter.rank == 20
    assert [adapter.linears[0, site].scaling for site in ("q_proj", "v_proj")] == [16 / 20, 3 / 8]
    assert adapter.linears[0, "q_proj"].pages.shape[0] == 2


# ---------------------------------------------------------------- the container


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

CONTAINERS = {
    "empty": (b"", "shorter than its header"),
    "short": (b"\0" * 7, "shorter than its header"),
    "header beyond the file": (container({}, length=1 << 20), "truncated"),
    "huge header": (container({}, length=1 << 63), "at most 4194304 are read"),
    "no JSON": (container(b"{]"), "not valid JSON"),
    "a list": (container([]), "an object is expected"),
    "a key twice": (container(b'{"a": 1, "a": 2}'), "appears twice"),
    "surplus bytes": (container({"a": ONE}, b"\0" * 9), "surplus"),
    "truncated data": (container({"a": ONE}, b"\0" * 7), "truncated"),
    "overlap": (container({"a": ONE, "b": ONE}, b"\0" * 8), "overlap"),
    "gap": (container({"a": {**ONE, "data_offsets": [4, 12]}}, b"\0" * 12), "gap"),
    "size is not the shape's": (container({"a": {**ONE, "shape": [3]}}, b"\0" * 8), "gap or an overlap"),
    "backwards": (container({"a": {**ONE, "data_offsets": [8, 0]}}, b"\0" * 8), "gap or an overlap"),
    "negative": (container({"a": {**ONE, "data_offsets": [-8, 0]}}), "no list of sizes"),
    "huge shape": (container({"a": {**ONE, "shape": [1 << 62, 1 << 62]}}, b"\0" * 8), "no list of sizes"),
    "boolean shape": (container({"a": {**ONE, "shape": [True, 2]}}, b"\0" * 8), "no list of sizes"),
    "text offsets": (container({"a": {**ONE, "data_offsets": ["0", "8"]}}, b"\0" * 8), "no list of sizes"),
    "no shape": (container({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8), "other than by dtype"),
    "not an object": (container({"a": 3}), "other than by dtype"),
    "dtype is a list": (container({"a": {**ONE, "dtype": ["F32"]}}, b"\0" * 8), "served are F32"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_hostile_containers(layout: ModelLayout, write_adapter: Any, tmp_path: Path, case: str) -> None:
    content, message = CONTAINERS[case]
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(MalformedAdapter, match=message):
        load(tmp_path / "a", layout)


@pytest.mark.parametrize("cut", [1, 4, 1000])
def test_truncated_files(layout: ModelLayout, write_adapter: Any, tmp_path: Path, cut: int) -> None:
    write_adapter(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-cut])
    with pytest.raises(MalformedAdapter, match="truncated"):
        load(tmp_path / "a", layout)


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_named_and_not_read(layout: ModelLayout, write_adapter: Any, tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / name)
    with pytest.raises(MalformedAdapter, match=f"{name} is not read") as refused:
        load(tmp_path / "a", layout)
    assert str(tmp_path) not in refused.value.message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(layout: ModelLayout, write_adapter: Any, tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(MalformedAdapter, match=f"the folder has no {name}"):
        load(tmp_path / "a", layout)


def test_a_file_that_is_too_large_is_not_read(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    os.truncate(tmp_path / "a" / "adapter_model.safetensors", 1 << 40)  # sparse
    with pytest.raises(MalformedAdapter, match="has 1099511627776 bytes"):
        load(tmp_path / "a", layout)
    os.truncate(tmp_path / "a" / "adapter_config.json", 1 << 30)
    with pytest.raises(MalformedAdapter, match=r"adapter_config\.json has 1073741824 bytes"):
        load(tmp_path / "a", layout)


def test_a_pipe_does_not_hang(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "a" / "adapter_config.json")
    with pytest.raises(MalformedAdapter, match="not a regular file"):
        load(tmp_path / "a", layout)


def test_links_out_of_the_roots_are_refused(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside")
    write_adapter(tmp_path / "root" / "a")
    weights = tmp_path / "root" / "a" / "adapter_model.safetensors"
    inside = weights.rename(tmp_path / "root" / "blob")
    weights.symlink_to(inside)
    assert load(tmp_path / "root" / "a", layout).rank == 8
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(PathRefused, match=r"adapter_model\.safetensors leads out") as refused:
        load(tmp_path / "root" / "a", layout)
    assert str(tmp_path) not in refused.value.message


def test_unsupported_configs_come_before_tensors(layout: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", use_bdlora=True, edit=spoil(float("nan")))
    with pytest.raises(UnsupportedField, match="use_bdlora is True, this server takes null"):
        load(tmp_path / "a", layout)


def test_the_revision_frames_names_and_contents() -> None:
    files = [("b", b"xy"), ("a", b"z")]
    assert revision_of(files) == revision_of(files[::-1])
    others = [[("b", b"x"), ("a", b"yz")], [("bx", b"y"), ("a", b"z")], [("a", b"xy"), ("b", b"z")], files[:1]]
    assert len({revision_of(other) for other in [files, *others]}) == 5
    assert len(revision_of(files)) == 64
