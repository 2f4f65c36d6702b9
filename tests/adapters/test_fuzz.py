"""Readers under random damage: each returns or raises an AdapterError, soon, in little memory, with a message to show.

Valid files are mutated: bytes flipped, cut out, doubled; JSON values swapped for others. The same examples every time,
a hundred times as many and other ones with `--hypothesis-profile=long`. What was found is kept in `corpus/`.
"""

from __future__ import annotations

import copy
import json
import math
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorry.adapters.errors import AdapterError
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading.files import Place
from lorry.adapters.reading.matching import TIME_LIMIT, Matcher
from lorry.adapters.reading.report import report_on
from lorry.adapters.reading.spec import AdapterSpec
from lorry.adapters.reading.strict_json import parse_object
from lorry.adapters.reading.targets import targets_of
from lorry.adapters.reading.tensor_file import parse_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CORPUS = Path(__file__).parent / "corpus"
LONG = settings.default.max_examples > 100
SECONDS = 1.0  # of this thread, for files of some kilobytes
MEMORY = 8 << 20


def fuzz(examples: int) -> Any:
    """Settings of a test that has so many examples in CI."""
    return settings(
        max_examples=100 * examples if LONG else examples,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def contained(seconds: float = SECONDS) -> Iterator[None]:
    """The property: nothing but an AdapterError leaves, whose texts can be shown and sent."""
    tracemalloc.start()
    begun = time.thread_time()
    try:
        yield
    except AdapterError as error:
        for text in (error.message, error.field, *error.details.values()):
            assert text.isprintable() and len(text) < 2000, repr(text)
            text.encode()
    finally:
        taken, (_, peak) = time.thread_time() - begun, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert taken < seconds, f"{taken:.2f} s"
    assert peak < MEMORY, f"{peak} bytes"


# ---------------------------------------------------------------- what is mutated

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "exclude_modules": None,
    "layers_to_transform": [0, 1],
    "layers_pattern": None,
    "rank_pattern": {"layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"^model.*[01].*q_proj": 3},
    "bias": "none",
    "init_lora_weights": True,
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "qalora_group_size": 16,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "alora_invocation_tokens": None,
    "loftq_config": {},
}
INTERESTING = [
    None, True, False, 0, -1, 1, 255, 256, 257, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320, math.pi, "",
    "LORA", "all-linear", "none", "all", "lora_only", "pissa", "olora", "loftq", ".*", "(", "[", "(.*)*$", "x{9999}",
    "q_proj", "model.embed_tokens", "lm_head", "\0", "\n", "\u202e", "\ud800", "é" * 99, "F32", "BF16", "I64", [], {},
    [[]], [None], ["q_proj", "q_proj"], [0, 10**20], {"": 1}, {"q_proj": 8}, {"(": 1}, {".*": 10**9}, [1] * 300,
    ["lm_head"], ["embed_tokens"], ["k_proj", "norm"], [0, 52, 53], {"lm_head": [1]}, {"embed_tokens": [10**20]},
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(INTERESTING),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.lists(st.integers(-9, 99), max_size=9),
    st.dictionaries(st.text(max_size=9), st.integers(), max_size=3),
)


def header_of(tensors: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    """name → (dtype, shape, bytes), laid end to end."""
    entries, position = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return {"__metadata__": {"format": "pt", "lorry.base_fingerprint": "ab" * 32}, **entries}


def container(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
HEADER = header_of(
    {Q.format(layer, half): ("F32", shape, 4 * math.prod(shape)) for layer in (0, 1, 2) for half, shape in
     (("A", [4, 37]), ("B", [43, 4]))}
)  # fmt: skip
DATA = bytes(range(1, 61)) * (3 * 4 * (37 + 43) * 4 // 60)


@st.composite
def mutated_json(draw: Any, value: Any) -> Any:
    """A JSON value of which up to three parts are replaced, renamed, dropped or doubled elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place, key = value, draw(st.sampled_from(sorted(value)))
        while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        match draw(st.integers(0, 4)):
            case 0 | 1:
                place[key] = copy.deepcopy(draw(VALUES))
            case 2 if isinstance(place, dict):
                place[draw(st.text(max_size=20))] = place.pop(key)
            case 3 if len(place) > 1:
                del place[key]
            case _:
                value[draw(st.sampled_from(sorted(value)))] = copy.deepcopy(place[key])
        if not value:
            return value
    return value


@st.composite
def mutated_bytes(draw: Any, content: bytes, hot: int) -> bytes:
    """Content with up to four bytes set, runs cut or doubled, or an end cut off, mostly among the `hot` first."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        limit = max(1, len(data) - 1 if draw(st.integers(0, 9)) == 0 else min(len(data) - 1, hot))
        at = draw(st.integers(0, limit))
        match draw(st.integers(0, 5)):
            case 0 | 1 | 2 if at < len(data):
                data[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'[]{}",:\\0919 ')))
            case 3:
                del data[at : at + draw(st.integers(1, 40))]
            case 4:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                del data[at:]
    return bytes(data)


# ---------------------------------------------------------------- one reader at a time


@fuzz(60)
@given(st.one_of(st.binary(max_size=99), mutated_bytes(json.dumps(PLAIN).encode(), 900)))
def test_json(data: bytes) -> None:
    with contained():
        parse_object(data, "it", 1 << 20)


@pytest.fixture(scope="module")
def layout(layout: ModelLayout) -> ModelLayout:
    """With an embedding and a head, which are one matrix."""
    hidden = layout.sites["q_proj"][0]
    return replace(layout, ends={"embed_tokens": (53, hidden), "lm_head": (hidden, 53)}, tied=True)


def _read_spec(content: bytes, layout: ModelLayout) -> None:
    spec = AdapterSpec.from_bytes(content)
    for linear in targets_of(spec, layout).factors:
        path = layout.module_path(*linear)
        assert math.isfinite(spec.scaling_of(path)) and 1 <= spec.rank_of(path) <= 256


@fuzz(120)
@given(config=mutated_json(PLAIN))
def test_specs(layout: ModelLayout, config: Any) -> None:
    with contained():
        _read_spec(json.dumps(config).encode(), layout)


ATOMS = [
    "a",
    ".",
    r"\d",
    "q_proj",
    r"\.",
    "[a-z]",
    "[^.]",
    "(?:a|.)",
    "(.)",
    r"\1",
    "(?=.)",
    "(?!x)",
    "(?i:a)",
    "^",
    "$",
    "",
]
REPEATS = ["", "*", "+", "?", "*?", "{2}", "{0,9}", "{,3}", "{30}", "{999}", "{4294967295}", "+?", "*+"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.lists(st.tuples(inner, st.sampled_from(REPEATS), st.booleans()), min_size=1, max_size=6).map(
        lambda parts: "".join(f"({each}){repeat}" if group else f"{each}{repeat}" for each, repeat, group in parts)
    ),
    max_leaves=24,
)


@fuzz(80)
@given(st.one_of(PATTERNS, st.text(alphabet="ab.()[]{}|*+?^$\\,019:!=<P>", max_size=40)))
def test_patterns(pattern: str) -> None:
    with contained(TIME_LIMIT + SECONDS):
        Matcher().match(pattern, "model.layers.11.self_attn.q_proj", "target_modules", whole=True)


@fuzz(120)
@given(st.one_of(mutated_json(HEADER).map(lambda h: container(h, DATA)), mutated_bytes(container(HEADER, DATA), 900)))
def test_tensor_files(content: bytes) -> None:
    data = bytearray(content)
    with contained():
        tensors = parse_tensors(data)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)


# ---------------------------------------------------------------- whole folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "a"
    path.mkdir()
    return path


class RandomBase:
    """For the methods that compute with the base's weights."""

    def __init__(self, layout: ModelLayout) -> None:
        self._layout = layout
        self.vocab_size = layout.ends["embed_tokens"][0]

    def weight(self, linear: Linear) -> Tensor:
        return torch.randn(self._layout.shape(linear[1])[::-1], generator=torch.Generator().manual_seed(0))

    def embedding(self, ids: Tensor) -> Tensor:
        return self.weight((ENDS, "embed_tokens")).T[ids].contiguous()

    head = embedding

    def bias(self, linear: Linear) -> Tensor | None:
        return None


@pytest.fixture(scope="module")
def put(folder: Path, layout: ModelLayout) -> Callable[[bytes, bytes], bool]:
    """put(config, weights): the folder holds them; whether it was loaded."""

    def put(config: bytes, weights: bytes) -> bool:
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        with contained():
            load_adapter(Place(folder, (folder.parent,)), layout, torch.bfloat16, RandomBase(layout))
            return True
        return False

    return put


GOOD = json.dumps(PLAIN | {"layers_to_transform": None}).encode(), container(HEADER, DATA)


def test_what_is_mutated_is_good(put: Callable[[bytes, bytes], bool]) -> None:
    assert put(*GOOD)


@fuzz(100)
@given(
    config=st.one_of(st.just(GOOD[0]), mutated_json(json.loads(GOOD[0])).map(lambda c: json.dumps(c).encode())),
    weights=st.one_of(
        st.just(GOOD[1]), mutated_json(HEADER).map(lambda h: container(h, DATA)), mutated_bytes(GOOD[1], 900)
    ),
)
def test_folders(put: Callable[[bytes, bytes], bool], config: bytes, weights: bytes) -> None:
    put(config, weights)


@fuzz(20)
@given(config=mutated_json(json.loads(GOOD[0])))
def test_reports(folder: Path, layout: ModelLayout, config: Any) -> None:
    """A report on any folder, whose numbers are finite where it is not refused."""
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(GOOD[1])
    place = Place(folder, (folder.parent,))
    report = report_on(place, layout, torch.bfloat16, RandomBase(layout), lambda: "ab" * 32)
    assert json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir() if path.suffix != ".md"))
def test_the_corpus(put: Callable[[bytes, bytes], bool], name: str) -> None:
    """A `.json` is a config beside good weights, a `.safetensors` weights beside a good config; all are refused."""
    content = (CORPUS / name).read_bytes()
    config, weights = (content, GOOD[1]) if name.endswith(".json") else (GOOD[0], content)
    assert not put(config, weights)


def test_every_file_of_the_corpus_has_its_line() -> None:
    listed = {line.split("`")[1] for line in (CORPUS / "README.md").read_text().splitlines() if line.startswith("- `")}
    assert listed == {path.name for path in CORPUS.iterdir()} - {"README.md"}
