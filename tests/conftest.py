"""Fixtures that several rooms share.

Triton decides when it is first imported, which bitsandbytes does too, whether its kernels run in the interpreter; so
that is settled here, before any test module is imported. So is how long OpenMP's threads spin, which torch's import
settles: as in the engine's process, or beside another process the steps of a tiny model take five times their time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from hypothesis import settings

settings.register_profile("long", max_examples=10_000)  # --hypothesis-profile=long

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is loaded and run from here on takes a GPU's path, with CPU tensors in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("without a GPU only: Triton's interpreter is off")
    from lorry.kernels import dispatch
    from lorry.kernels.layers import Layers
    from lorry.kernels.triton.nf4_fragments import Fragments
    from lorry.server.cache import kv_cache

    def caches(blocks: int, heads: int, size: int, width: int, dtype: torch.dtype, device: object) -> object:
        return tuple(torch.zeros(blocks, heads, size, width, dtype=dtype) for _ in range(2))

    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(Fragments, "on_device", classmethod(lambda cls, parts, bias: cls(parts, bias)))
    monkeypatch.setattr(kv_cache, "empty_caches", caches)
    monkeypatch.setattr(Layers, "serve", staticmethod(lambda *_: False))


@pytest.fixture(scope="session")
def random_peft() -> Callable[..., Any]:
    """random_peft(model, {adapter: LoraConfig}, deviation): a PeftModel with normal A and B."""
    from peft import get_peft_model

    def make(model: Any, configs: Mapping[str, Any], deviation: float) -> Any:
        peft: Any = None
        for adapter, config in configs.items():
            if peft is None:
                peft = get_peft_model(model, config, adapter_name=adapter)
            else:
                peft.add_adapter(adapter, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, deviation)
        return peft.eval()

    return make


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The default model as an NF4 checkpoint folder, converted into the user's cache if it is not there yet."""
    from lorry.server.model.store import DEFAULT_MODEL, resolve_model

    return resolve_model(DEFAULT_MODEL)
