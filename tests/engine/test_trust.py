"""Adapters that are refused beside requests that are served: one error each, which can be sent, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from lorry.adapters.reading.identity import FINGERPRINT_KEY
from lorry.server.engine.local import LocalEngine
from lorry.server.errors import MalformedAdapter, WrongBase

CORPUS = Path(__file__).parents[1] / "adapters" / "corpus"
PROMPT = [7, 3, 99, 12, 55]


@pytest.fixture
def folder(adapters_dir: Path, tmp_path: Path) -> Path:
    """A good adapter `a`, and each file of the corpus in the place of one of its files."""
    shutil.copytree(adapters_dir / "a", tmp_path / "a")
    for case in CORPUS.iterdir():
        if case.suffix != ".md":
            shutil.copytree(tmp_path / "a", tmp_path / case.stem)
            name = "adapter_config.json" if case.suffix == ".json" else "adapter_model.safetensors"
            shutil.copy(case, tmp_path / case.stem / name)
    return tmp_path


def test_the_corpus_disturbs_nobody(build: Any, generate: Any, folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.name != "a")
    alone = build(adapters_dir=str(folder)).generate(generate("a", PROMPT, adapters={"a": 1.0}))[0].tokens()
    engine: LocalEngine = build(adapters_dir=str(folder))
    good, *bad = engine.generate(
        generate("a", PROMPT, adapters={"a": 1.0}), *(generate(name, PROMPT, adapters={name: 1.0}) for name in names)
    )
    assert good.tokens() == alone
    for name, answer in zip(names, bad, strict=True):
        assert isinstance(answer.error, MalformedAdapter) and answer.error.message.isprintable(), name
    assert len(names) > 9 and msgspec.msgpack.encode(engine.messages)


@pytest.mark.parametrize("allowed", [False, True])
def test_an_adapter_of_another_base(build: Any, generate: Any, folder: Path, decoder: Any, allowed: bool) -> None:
    for name, fingerprint in (("ours", decoder.fingerprint), ("theirs", "0" * 64)):
        shutil.copytree(folder / "a", folder / name)
        weights = folder / name / "adapter_model.safetensors"
        save_file(load_file(weights), weights, metadata={FINGERPRINT_KEY: fingerprint})
    engine: LocalEngine = build(adapters_dir=str(folder), allow_base_mismatch=allowed)
    plain, ours, theirs = engine.generate(
        *(generate(name, PROMPT, adapters={name: 1.0}) for name in ("a", "ours", "theirs"))
    )
    assert ours.tokens() == plain.tokens()
    if allowed:
        assert theirs.tokens() == plain.tokens()
    else:
        assert isinstance(theirs.error, WrongBase) and theirs.error.fields["actual"] == "0" * 64
