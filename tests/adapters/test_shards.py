"""Weights in several files and their index: read like one file, and refused by name where the two disagree."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from random_adapters import NoBase
from safetensors.torch import load_file, save_file

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.errors import AdapterError, MalformedAdapter, PathRefused, WrongBase
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading.files import Place, revision_of
from lorry.adapters.reading.identity import FINGERPRINT_KEY
from lorry.adapters.reading.report import report_on
from lorry.adapters.reading.shards import MAX_SHARDS, ShardIndex, shard_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def shard(folder: Path, max_shard_size: int = 3500, metadata: dict[str, str] | None = None) -> list[str]:
    """Replace the weights by shards as huggingface_hub writes them; their names in order."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(
        tensors, folder, filename_pattern=pattern, max_shard_size=max_shard_size, metadata=metadata or {"format": "pt"}
    )
    return sorted(path.name for path in folder.glob("adapter_model-*.safetensors"))


def load(folder: Path, layout: ModelLayout) -> CanonicalAdapter:
    return load_adapter(Place(folder, (folder.parent,)), layout, torch.float32, NoBase())


@pytest.fixture
def folder(write_adapter: Any, tmp_path: Path) -> Path:
    """An adapter of several shards; shards[0] has more than one tensor."""
    write_adapter(tmp_path / "a")
    assert len(shard(tmp_path / "a")) == 5
    return tmp_path / "a"


@pytest.mark.parametrize("max_shard_size", [1, 3500, 9000])
def test_shards_are_one_adapter(layout: ModelLayout, write_adapter: Any, tmp_path: Path, max_shard_size: int) -> None:
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "many")
    names = shard(tmp_path / "many", max_shard_size)
    assert len(names) == {1: 12, 3500: 5, 9000: 2}[max_shard_size]
    one, many = load(tmp_path / "one", layout), load(tmp_path / "many", layout)
    assert one.linears.keys() == many.linears.keys()
    assert all(torch.equal(one.linears[key].pages, many.linears[key].pages) for key in one.linears)
    files = [(name, (tmp_path / "many" / name).read_bytes()) for name in (CONFIG, INDEX, *names)]
    assert many.revision == revision_of(files) != one.revision


def test_the_revision_is_of_every_file(layout: ModelLayout, folder: Path) -> None:
    seen = {load(folder, layout).revision}
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index))  # the same index in other bytes
    seen.add(load(folder, layout).revision)
    for name in sorted(folder.glob("adapter_model-*")):
        tensors = load_file(name)
        save_file({key: tensor + 1 for key, tensor in tensors.items()}, name, metadata={"format": "pt"})
        seen.add(load(folder, layout).revision)
    assert len(seen) == 7


def test_the_fingerprint_stands_in_the_index_or_in_shards(
    layout: ModelLayout, write_adapter: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    write_adapter(folder)
    names = shard(folder, metadata={FINGERPRINT_KEY: "ab" * 32})
    served = replace(layout, fingerprint="ab" * 32)
    assert load(folder, served).rank == 8
    with pytest.raises(WrongBase, match="another quantized base"):
        load(folder, replace(layout, fingerprint="cd" * 32))
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"].pop(FINGERPRINT_KEY) == "ab" * 32, "that is where huggingface_hub writes it"
    (folder / INDEX).write_text(json.dumps(index))
    save_file(load_file(folder / names[2]), folder / names[2], metadata={FINGERPRINT_KEY: "cd" * 32})
    with pytest.raises(WrongBase, match="another quantized base"):
        load(folder, served)
    save_file(load_file(folder / names[1]), folder / names[1], metadata={FINGERPRINT_KEY: "ab" * 32})
    with pytest.raises(MalformedAdapter, match=f"{names[2]} has another 'lorry.base_fingerprint'"):
        load(folder, served)


def test_a_report_probes_shards(layout: ModelLayout, folder: Path) -> None:
    report = report_on(Place(folder, (folder.parent,)), layout, torch.bfloat16, NoBase(), lambda: "")
    assert report.error is None and report.probe is not None and report.probe.within
    (folder / shard_name(3, 5)).unlink()
    refused = report_on(Place(folder, (folder.parent,)), layout, torch.bfloat16, NoBase(), lambda: "")
    assert refused.error is not None and refused.error.field == shard_name(3, 5)


def test_a_changed_shard_is_a_new_revision(drive: Any, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    names = shard(tmp_path / "a")
    driver = drive()
    old = driver.start("a")
    time.sleep(0.03)  # the least difference of two times of files is below
    path = tmp_path / "a" / names[1]
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    driver.look()
    new = driver.start("a")
    assert new.revisions != old.revisions
    driver.end(old, new)


# ---------------------------------------------------------------- what lies


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def mapped(name: object) -> Callable[[Path], None]:
    """The index says that the first tensor is in the file `name`."""
    return edit(lambda index: index["weight_map"].update({min(index["weight_map"]): name}))


def every(name: str) -> Callable[[Path], None]:
    return edit(lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], name)))


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_bytes(content)


def swap(folder: Path) -> None:
    one, two = folder / shard_name(1, 5), folder / shard_name(2, 5)
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)


def repeat(folder: Path) -> None:
    """A tensor of the first shard in the second too."""
    one, two = load_file(folder / shard_name(1, 5)), load_file(folder / shard_name(2, 5))
    save_file({**two, min(one): one[min(one)]}, folder / shard_name(2, 5))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        lambda folder: (folder / shard_name(4, 5)).unlink(),
        f"no {shard_name(4, 5)}, which {INDEX} names",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), f"shards of the weights and no {INDEX}"),
    "a shard too many": (
        lambda folder: (folder / shard_name(1, 6)).write_bytes(b""),
        f"has {shard_name(1, 6)} besides {shard_name(1, 5)}",
    ),
    "one file besides": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / shard_name(1, 5)).read_bytes()),
        f"has {WEIGHTS} besides",
    ),
    "swapped shards": (swap, f"is not in {shard_name(1, 5)}, where {INDEX} says"),
    "a tensor twice": (repeat, f"is in {shard_name(2, 5)}, which is not where {INDEX} says"),
    "a tensor that is nowhere": (
        edit(lambda index: index["weight_map"].update({"model.x": shard_name(5, 5)})),
        f"'model.x' is not in {shard_name(5, 5)}, where {INDEX} says",
    ),
    "a tensor unsaid": (
        edit(lambda index: index["weight_map"].pop(max(index["weight_map"]))),
        "which is not where",
    ),
    "a shard unsaid": (
        edit(
            lambda index: index.update(
                weight_map={key: name for key, name in index["weight_map"].items() if name != shard_name(2, 5)}
            )
        ),
        f"has no tensor in {shard_name(2, 5)}",
    ),
    "another count": (mapped(shard_name(1, 6)), f"no tensor in {shard_name(2, 6)}|besides {shard_name(1, 6)}"),
    "a path upwards": (mapped("../a/" + shard_name(1, 5)), r"names the file '\.\./a/adapter_model"),
    "an absolute path": (mapped("/etc/passwd"), "names the file '/etc/passwd'"),
    "a folder below": (mapped("x/" + shard_name(1, 5)), "names the file"),
    "a device": (mapped("/dev/zero"), "names the file"),
    "the config": (mapped(CONFIG), "names the file"),
    "the one file": (every(WEIGHTS), "names the file"),
    "shard zero": (mapped(shard_name(0, 5)), "names the file"),
    "shard beyond": (mapped(shard_name(6, 5)), "names the file"),
    "other digits": (mapped("adapter_model-٠٠٠٠١-of-٠٠٠٠٥.safetensors"), "names the file"),
    "a newline": (mapped(shard_name(1, 5) + "\n"), "names the file"),
    "no text": (mapped(3), "names the file '3'"),
    "a list": (mapped([shard_name(1, 5)]), "names the file"),
    "a great many": (every(shard_name(1, 99_999)), f"one of 99999 files, at most {MAX_SHARDS}"),
    "no map": (raw(b"{}"), "has no weight_map"),
    "an empty map": (raw(b'{"weight_map": {}}'), "has no weight_map"),
    "a list of maps": (raw(b'{"weight_map": []}'), "has no weight_map"),
    "metadata are a text": (edit(lambda index: index.update(metadata="x")), "metadata that are no object"),
    "another field": (edit(lambda index: index.update(offset=1)), "has the field 'offset'"),
    "a key twice": (raw(b'{"weight_map": {"a": "b", "a": "c"}}'), "appears twice"),
    "no JSON": (raw(b"PK\x03\x04"), "not valid JSON"),
    "deep": (raw(b"[" * 99), "nested deeper"),
    "many values": (raw(b'{"weight_map": [' + b"1," * (1 << 18) + b"1]}"), "more than 262144 values"),
    "a huge index": (lambda folder: os.truncate(folder / INDEX, 1 << 40), "has 1099511627776 bytes"),
    "a pickle": (lambda folder: (folder / shard_name(2, 5)).write_bytes(b"\x80" * 99), f"{shard_name(2, 5)} is a pick"),
    "a cut shard": (
        lambda folder: os.truncate(folder / shard_name(2, 5), 999),
        f"{shard_name(2, 5)} is truncated",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_shards(layout: ModelLayout, folder: Path, case: str) -> None:
    change, message = HOSTILE[case]
    change(folder)
    with pytest.raises(MalformedAdapter, match=message) as refused:
        load(folder, layout)
    assert refused.value.message.isprintable() and len(refused.value.message) < 500


def test_shards_stay_below_the_roots(layout: ModelLayout, folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "root"
    inside.mkdir()
    outside = folder / shard_name(3, 5)
    target = outside.rename(tmp_path / "elsewhere")
    outside.symlink_to(target)
    folder = folder.rename(inside / "a")
    with pytest.raises(PathRefused, match=f"{shard_name(3, 5)} leads out"):
        load(folder, layout)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_shard_that_is_no_file(layout: ModelLayout, folder: Path, kind: str) -> None:
    path = folder / shard_name(3, 5)
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(MalformedAdapter, match=f"{shard_name(3, 5)} is not a regular file"):
        load(folder, layout)


def test_sparse_giants_take_no_memory(folder: Path) -> None:
    """Shards have together what one file may have, and none is read whose header is not what the index says."""
    large = ModelLayout(layers=36, sites={"q_proj": (4096, 8192), "v_proj": (4096, 8192), "k_proj": (4096, 4096)})
    limit = large.max_weight_bytes()
    for name in (shard_name(number, 5) for number in range(1, 6)):
        os.truncate(folder / name, limit // 3)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match=f"{shard_name(1, 5)} is truncated or has surplus bytes"):
            load(folder, large)
        text = json.dumps({"a": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}).encode()
        with open(folder / shard_name(1, 5), "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + (1 << 30))
        with pytest.raises(MalformedAdapter, match=f"not in {shard_name(1, 5)}|in {shard_name(1, 5)}, which is not"):
            load(folder, large)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_the_sizes_of_all_shards_count_together(layout: ModelLayout, folder: Path) -> None:
    os.truncate(folder / shard_name(5, 5), layout.max_weight_bytes() + (4 << 20))  # that much alone would be legal
    with pytest.raises(MalformedAdapter, match=f"{shard_name(5, 5)} has .* besides the shards before it"):
        load(folder, layout)


def test_an_index_of_many_tensors_is_read_in_linear_time() -> None:
    names = {f"t{number}": shard_name(number % MAX_SHARDS + 1, MAX_SHARDS) for number in range(60_000)}
    content = json.dumps({"weight_map": names}).encode()
    begun = time.thread_time()
    assert len(ShardIndex.from_bytes(content).shards) == MAX_SHARDS
    assert time.thread_time() - begun < 2
