"""Adapters checked against a model that is not served: its shapes and, where an adapter asks for them, its weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lorry.adapters.layout import ENDS, PAGE_DTYPES, Linear
from lorry.adapters.reading.files import Place
from lorry.adapters.reading.report import Report as Report
from lorry.adapters.reading.report import report_on
from lorry.kernels.nf4 import NF4Weight, dequantize
from lorry.server.model.errors import ModelNotFound
from lorry.server.model.load import base_fingerprint, open_checkpoint, read_config
from lorry.server.model.store import resolve_model
from lorry.server.model.weights import Checkpoint, layout_of, read_ends


class AdapterCheck:
    """A base by name, as `resolve_model` takes it; raises what that raises.

    Its config is read at once. Its weights are when an adapter names a fingerprint or has a method, such as DoRA, that
    computes with them. `lorry.adapters.reading.base.BaseWeights` of the checkpoint.
    """

    def __init__(self, model: str) -> None:
        self._folder = resolve_model(model)
        self._config = read_config(self._folder)[0]
        self.layout = replace(layout_of(self._config), base=Path(model).name)

    def report(self, folder: Path, dtype: str = "auto") -> Report:
        """What becomes of an adapter folder, whose links may lead anywhere; dtype: of its pages, as `PAGE_DTYPES`."""
        return report_on(Place(folder, (Path("/"),)), self.layout, PAGE_DTYPES[dtype], self, lambda: self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base; "" for a folder that has a config.json and no weights."""
        try:
            return base_fingerprint(self._folder)
        except ModelNotFound:
            return ""

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(self._folder)

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    def embedding(self, ids: Tensor) -> Tensor:
        return self._ends[0][ids].float()

    def head(self, ids: Tensor) -> Tensor:
        return self._ends[1][ids].float()

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """The matrices of embedding and head, [V, H]."""
        ends = read_ends(self._checkpoint)
        head = ends.embedding if ends.head is None else _dense(ends.head)
        return ends.embedding, head

    def weight(self, linear: Linear) -> Tensor:
        if linear[0] == ENDS:
            everything = torch.arange(self.vocab_size)
            return self.embedding(everything).T if linear[1] == "embed_tokens" else self.head(everything)
        shape = self._config.linear_shapes()[linear[1]]
        weight = self._checkpoint.linear(self.layout.module_path(*linear), shape)
        return _dense(weight)

    def bias(self, linear: Linear) -> Tensor | None:
        if linear[0] == ENDS or not self._config.biased(linear[1]):
            return None
        size = self._config.linear_shapes()[linear[1]][0]
        return self._checkpoint.tensor(f"{self.layout.module_path(*linear)}.bias", (size,)).float()


def _dense(weight: NF4Weight | Tensor) -> Tensor:
    """float32, a copy"""
    return dequantize(weight, torch.float32) if isinstance(weight, NF4Weight) else weight.to(torch.float32, copy=True)
