"""What lies about its size, its kind or its place: one clear error, at the price of what is there."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import NoBase

from lorry.adapters.catalog import Catalog
from lorry.adapters.errors import AdapterError, MalformedAdapter, PathRefused
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading import files, matching
from lorry.adapters.reading.files import Place
from lorry.adapters.reading.matching import Matcher
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.strict_json import MAX_VALUES, parse_object
from lorry.adapters.reading.tensor_file import parse_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATH = "model.layers.11.self_attn.q_proj"


@pytest.fixture
def folder(write_adapter: Any, tmp_path: Path) -> Path:
    """A good adapter below the root tmp_path."""
    write_adapter(tmp_path / "a")
    return tmp_path / "a"


def refused(folder: Path, layout: ModelLayout, *roots: Path) -> AdapterError:
    place = Place(folder, roots or (folder.parent,))
    with pytest.raises(AdapterError) as error:
        load_adapter(place, layout, torch.float32, NoBase())
    assert str(folder.parent) not in error.value.message
    return error.value


# ---------------------------------------------------------------- another kind of file


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "torch.save": (zipped, "is a zip archive"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": [1.0] * 99}, protocol=4)), "is a pickle"),
    "Git LFS": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(99)), "is a GGUF file"),
}


@pytest.mark.parametrize("case", KINDS)
def test_another_kind_of_file_under_the_weights_name(layout: ModelLayout, folder: Path, case: str) -> None:
    write, message = KINDS[case]
    write(folder / WEIGHTS)
    assert message in refused(folder, layout).message


@pytest.mark.parametrize("name", ["model.pickle", "a\nb.bin", os.fsdecode(b"\xff.bin")])
def test_a_pickle_by_a_name_that_no_message_could_carry(layout: ModelLayout, folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    error = refused(folder, layout)
    assert "is not read, only" in error.message and (error.message + error.field).isprintable()


def bind(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_not_opened(
    layout: ModelLayout, folder: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    really_open = os.open

    def guarded(path: Any, *arguments: Any) -> int:
        assert Path(path).is_file(), f"{path} was opened"
        return really_open(path, *arguments)

    monkeypatch.setattr(files.os, "open", guarded)
    error = refused(folder, layout, Path("/"))
    assert (error.field, "not a regular file" in error.message) == (name, True)


# ---------------------------------------------------------------- another place, another moment


def test_a_folder_that_becomes_a_link_after_its_path_was_resolved(
    layout: ModelLayout, folder: Path, write_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder.parent / "root"
    write_adapter(root / "real" / "b")
    (root / "b").symlink_to(folder, target_is_directory=True)
    monkeypatch.setattr(files.os.path, "realpath", lambda path: str(path))  # resolved before it was a link
    with pytest.raises(PathRefused, match="leads out of the adapter roots"):
        load_adapter(Place(root / "b", (root,)), layout, torch.float32, NoBase())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("change", ["touched", "replaced", "shortened"])
def test_files_that_change_while_they_are_read(
    layout: ModelLayout, folder: Path, name: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = files._fill

    def disturbed(file: Any, begun: bytearray, size: int, of: str, *rest: Any) -> bytearray:
        path = folder / name
        if of == name and change == "shortened":
            os.truncate(path, 5)
        content = fill(file, begun, size, of, *rest)
        if of == name and change == "touched":
            os.utime(path, (1, 1))
        elif of == name and change == "replaced":
            (folder / "aside").write_bytes(path.read_bytes())
            (folder / "aside").replace(path)
        return content

    monkeypatch.setattr(files, "_fill", disturbed)
    error = refused(folder, layout)
    assert (error.field, "changed while it was read" in error.message) == (name, True)


def test_hidden_folders_are_not_found_by_their_name(folder: Path) -> None:
    folder.rename(folder.parent / ".a")
    assert Catalog(folder.parent).find(".a") is None and Catalog(folder.parent).scan() == {}


# ---------------------------------------------------------------- more than there is


@pytest.fixture
def large() -> ModelLayout:
    """Of adapters of up to 2.4 GB."""
    return ModelLayout(layers=36, sites={"q_proj": (4096, 8192), "o_proj": (8192, 4096), "k_proj": (4096, 4096)})


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Most bytes that Python has held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize("content", [b"", header({}), header({"a": entry(0, 1 << 20)}), struct.pack("<Q", 1 << 21)])
def test_sparse_giants_take_no_memory(
    large: ModelLayout, folder: Path, content: bytes, peak: Callable[[], int]
) -> None:
    (folder / WEIGHTS).write_bytes(content)
    os.truncate(folder / WEIGHTS, 2 << 30)
    assert refused(folder, large).field == WEIGHTS or content[8:]
    assert peak() < 16 << 20


def test_too_many_values_are_counted_before_they_are_built(peak: Callable[[], int]) -> None:
    for content in (b'{"a": [' + b"[]," * (1 << 20) + b"[]]}", b'{"a": [' + b"1234," * (1 << 19) + b"1]}"):
        begun = peak()
        with pytest.raises(MalformedAdapter, match=f"more than {MAX_VALUES} values"):
            parse_object(content, "it", 4 << 20)
        assert peak() - begun < len(content) + (1 << 16)


def test_many_tensors_that_overlap() -> None:
    content = bytearray(header({f"t{at}": entry(0, 4) for at in range(6_000)}) + b"\0" * 4)
    begun = time.thread_time()
    with pytest.raises(MalformedAdapter, match="overlap"):
        parse_tensors(content)
    assert time.thread_time() - begun < 2


QUOTES = {
    "escaped quotes": b'"' + b'\\"' * (1 << 19),
    "backslashes": b'"' + b"\\" * (1 << 19),
    "quotes": b'"' * (1 << 19),
    "strings": b'{"a": "[", ' * 90_000,
    "closing brackets": b"]" * (1 << 19),
}


@pytest.mark.parametrize("case", QUOTES)
def test_json_is_refused_in_linear_time(case: str) -> None:
    begun = time.thread_time()
    with pytest.raises(MalformedAdapter):
        parse_object(QUOTES[case], "it", 4 << 20)
    assert time.thread_time() - begun < 1


@pytest.mark.parametrize(
    "text", [b'{"\\ud800": 1}', b'{"a": ["\\uDFFF"]}', b'{"r\\ud83d": true, "x": "\\ud83d\\ude00"}']
)
def test_half_a_surrogate_pair_is_no_text(text: bytes) -> None:
    with pytest.raises(MalformedAdapter, match="not valid JSON"):
        parse_object(text, "it", 1 << 20)
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "it", 99) == {"a": "😀"}


@pytest.mark.parametrize("name", ["a\nlevel=error", "\x1b[31m", "\u202e", "x" * 999])
def test_messages_can_be_shown(layout: ModelLayout, folder: Path, write_adapter: Any, name: str) -> None:
    write_adapter(folder, **{name: True})
    errors = [refused(folder, layout)]
    write_adapter(folder, edit=lambda tensors: tensors.update({name: torch.ones(1)}))
    errors.append(refused(folder, layout))
    for error in errors:
        assert error.message.isprintable() and len(error.message) < 500 and len(error.field) <= 200


# ---------------------------------------------------------------- patterns

BOMBS = [
    "x{4294967294}",
    "((a?){1000}){1000}.*",
    "(((a?){100}){100}){100}.*",
    "(?:(?:){60000}){60000}",
    "(?:x*){4294967294}",
    "(?i)" + r"[\u0000-\U0010ffff]" * 150,
    "(?i)[\0-\U0010ffff]",
    "(?x)( #)\n(?:a?) {60000}",
    "(?#[)(a?){60000}(?#])",
    "(?:a{e<=3}){e<=5}.*",
    "[[:alpha:]]+",
]


@pytest.mark.parametrize("pattern", BOMBS, ids=range(len(BOMBS)))
def test_patterns_that_would_explode_in_the_compiler(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching.regex, "compile", lambda _: pytest.fail("it was compiled"))
    with pytest.raises(MalformedAdapter, match=r"target_modules: .*(repeats? too much|not read|characters)") as error:
        Matcher().match(pattern, PATH, "target_modules", whole=True)
    assert error.value.message.isprintable()


def test_many_patterns_have_one_bound_together() -> None:
    matcher = Matcher()
    keys = [(f"(?:a?){{1500}}{at}", at) for at in range(99)]
    with pytest.raises(MalformedAdapter, match="rank_pattern: its patterns repeat too much"):
        matcher.pattern_value(keys, PATH, "rank_pattern")


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.\d{1,2}\..*\.(q|k)_proj",
        r"(?:.*?(?:language|text).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|q_proj)))",
        r"[{]|\{e\}|[]}]|\\\{|.*proj",
        r"(?P<x>.)(?:.){31}",
    ],
)
def test_patterns_as_people_write_them(pattern: str) -> None:
    assert Matcher().match(pattern, PATH, "target_modules", whole=True)


def test_long_lists_cost_no_more_than_short_ones(layout: ModelLayout) -> None:
    names = ["q_proj", *(f"no.module.{at}" for at in range(60_000))]
    config = {"peft_type": "LORA", "r": 8, "target_modules": names, "exclude_modules": names[1:]}
    spec = AdapterSpec.from_json({**config, "rank_pattern": dict.fromkeys(names[1:], 4)})
    begun = time.thread_time()
    assert spec.adapted_linears(layout) == [(layer, "q_proj") for layer in range(layout.layers)]
    assert time.thread_time() - begun < 0.5
    assert spec.rank_of(PATH) == 8


def test_a_pattern_for_every_module_of_a_large_model() -> None:
    """EVA writes such configs; their time is that of the thread, whatever else the machine does."""
    large = ModelLayout(layers=80, sites=dict.fromkeys(("q_proj", "v_proj"), (8, 8)))
    paths = [large.module_path(*linear) for linear in large.linears()]
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "rank_pattern": dict.fromkeys(paths, 4)}
    spec = AdapterSpec.from_json({**config, "alpha_pattern": {path.replace(".", r"\."): 3 for path in paths}})
    assert {(spec.rank_of(path), spec.scaling_of(path)) for path in paths} == {(4, 3 / 4)}
