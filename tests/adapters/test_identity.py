"""The base that an adapter names: refused when it is another, warned of when there is no saying."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import NoBase
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorry.adapters.catalog import Catalog
from lorry.adapters.errors import MalformedAdapter, WrongBase
from lorry.adapters.layout import ModelLayout
from lorry.adapters.loader import Loader, load_adapter
from lorry.adapters.reading.identity import FINGERPRINT_KEY, check_base

OURS, THEIRS = "0f" * 32, "e1" * 32


@pytest.fixture
def served(layout: ModelLayout) -> ModelLayout:
    return replace(layout, base="SmolLM2-135M", fingerprint=OURS)


def name_base(folder: Path, fingerprint: str) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", FINGERPRINT_KEY: fingerprint})


def test_the_fingerprint_decides(served: ModelLayout, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", base_model_name_or_path="another/name")
    place = Catalog(tmp_path).find("a")
    assert place is not None
    doubts: list[str] = []
    name_base(tmp_path / "a", OURS)
    assert load_adapter(place, served, torch.float32, NoBase(), doubts.append).rank == 8
    assert doubts == []

    name_base(tmp_path / "a", THEIRS)
    with pytest.raises(WrongBase, match=r"on the base e1e1e1e1e1e1, this one is 0f0f0f0f0f0f; --allow-base") as refused:
        load_adapter(place, served, torch.float32, NoBase())
    assert refused.value.field == FINGERPRINT_KEY
    assert refused.value.details == {"expected": OURS, "actual": THEIRS}

    allowed = replace(served, allow_base_mismatch=True)
    assert load_adapter(place, allowed, torch.float32, NoBase(), doubts.append).rank == 8
    assert doubts == ["it was trained on the base e1e1e1e1e1e1, this one is 0f0f0f0f0f0f"]
    assert check_base({FINGERPRINT_KEY: THEIRS}, "", replace(served, fingerprint="")) == ""


@pytest.mark.parametrize("value", ["", "0F" * 32, "0f" * 31, "0f" * 32 + "\n", "\x1b" * 64])
def test_what_is_no_fingerprint(served: ModelLayout, value: str) -> None:
    with pytest.raises(MalformedAdapter, match="64 hexadecimal digits") as refused:
        check_base({FINGERPRINT_KEY: value}, "", served)
    assert refused.value.message.isprintable()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "was called 'SmolLM2-135M', as this one is"),
        ("/home/someone/models/smollm2_135m-bnb-4bit/", "was called 'smollm2_135m-bnb-4bit', as this one is"),
        (r"C:\models\SmolLM2-135M.gguf", "as this one is"),
        ("unsloth/SmolLM2-135M-unsloth-bnb-4bit", "as this one is"),
        ("HuggingFaceTB/SmolLM2-360M", "was called 'SmolLM2-360M', this one 'SmolLM2-135M'"),
        ("a\nb", r"'a\\nb', this one"),
        ("", "names no base either"),
    ],
)
def test_names_are_all_there_is_without_fingerprints(served: ModelLayout, named: str, said: str) -> None:
    doubt = check_base({"format": "pt"}, named, served)
    assert said.replace("\\\\", "\\") in doubt and doubt.startswith("it does not say which quantized base")
    assert doubt.isprintable() and "someone" not in doubt


def test_one_warning_for_each_adapter(
    served: ModelLayout, write_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Loader(served, torch.float32, NoBase())
    for name in "abab":
        write_adapter(tmp_path / name)
        place = Catalog(tmp_path).find(name)
        assert place is not None
        with caplog.at_level(logging.WARNING):
            loader.submit(0, place)
            loader.close()
    assert all(loaded.error is None for loaded in loader.results())
    warnings = [record.getMessage() for record in caplog.records if "quantized base" in record.getMessage()]
    assert [message[:17] for message in warnings] == ["the adapter in a:", "the adapter in b:"]


def test_the_example_adapters_name_the_default_base(smollm2_folder: Path) -> None:
    from lorry.server.model.load import base_fingerprint

    expected = base_fingerprint(smollm2_folder)
    folders = sorted(path.parent for path in Path(__file__).parents[2].glob("examples/adapters/*/adapter_config.json"))
    for folder in folders:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", FINGERPRINT_KEY: expected}
    assert len(folders) == 3
