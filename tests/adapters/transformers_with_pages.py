"""A model of transformers that PEFT trains an adapter on, and the same followed by this server's adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorry.adapters.canonical import CanonicalAdapter
from lorry.adapters.catalog import Catalog
from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import ENDS, Linear, ModelLayout
from lorry.adapters.loader import load_adapter
from lorry.adapters.segments import Combo, build_segments
from lorry.kernels.lora import END_SITES, SITES, Site, lora_add, lora_embed


def layout_of(model: PreTrainedModel) -> ModelLayout:
    """The layout of a model of the Llama family."""
    modules = dict(model.named_modules())
    linears = {site: modules[ModelLayout.module_path(0, site)] for site in SITES}
    shapes = {site: (linear.in_features, linear.out_features) for site, linear in linears.items()}
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    ends = {"embed_tokens": (vocabulary, hidden), "lm_head": (hidden, vocabulary)}
    return ModelLayout(model.config.num_hidden_layers, shapes, ends=ends, tied=model.config.tie_word_embeddings)


class Base:
    """The weights of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.vocab_size = len(self.modules["model.embed_tokens"].weight)

    def weight(self, linear: Linear) -> Tensor:
        weight = self.modules[ModelLayout.module_path(*linear)].weight.detach().clone()
        return weight.T if linear == (ENDS, "embed_tokens") else weight

    def embedding(self, ids: Tensor) -> Tensor:
        return self.modules["model.embed_tokens"].weight.detach()[ids].clone()

    def head(self, ids: Tensor) -> Tensor:
        return self.modules["lm_head"].weight.detach()[ids].clone()

    def bias(self, linear: Linear) -> Tensor | None:
        bias = getattr(self.modules[ModelLayout.module_path(*linear)], "bias", None)
        return None if bias is None else bias.detach().clone()


def write(model: PreTrainedModel, folder: Path, seed: int = 1, saved: bool | str = "auto", **config: Any) -> None:
    """Train, so to say, an adapter on a copy of the model, and let PEFT save it; saved: save_embedding_layers."""
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:  # in place, since some are tied
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(parameter.data * (1 + 0.2 * noise) if "magnitude" in name else noise * 0.3)
    tuned.save_pretrained(str(folder), save_embedding_layers=saved)


def read(folder: Path, layout: ModelLayout, base: Any) -> CanonicalAdapter:
    place = Catalog(folder.parent).find(folder.name)
    assert place is not None
    return load_adapter(place, layout, torch.float32, base)


def resident(pool: PagePool, adapter: CanonicalAdapter, weight: float = 1.0) -> Combo:
    """What a row names that uses the adapter."""
    slot = pool.insert(adapter)
    assert slot is not None
    return tuple((own, weight) for own in pool.all_slots(slot))


class WithPages(nn.Module):
    """A linear of transformers with this server's update behind it."""

    def __init__(
        self, base: nn.Linear, pool: PagePool, layer: int, site: str, runs: Sequence[tuple[int, Combo]]
    ) -> None:
        super().__init__()
        assert pool.pages.ends is not None
        self.base, self.segments = base, build_segments(runs)
        self.pages, self.layer = (pool.pages.ends, 0) if layer == ENDS else (pool.pages, layer)
        index = (END_SITES if layer == ENDS else SITES).index(site)
        self.site = Site(index, 0, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows = y.view(-1, y.shape[-1])
        lora_add(rows, x.reshape(-1, x.shape[-1]), self.pages, self.layer, (self.site,), self.segments)
        return y


class EmbeddingWithPages(nn.Module):
    """An embedding with this server's update behind it."""

    def __init__(self, base: nn.Embedding, pool: PagePool, runs: Sequence[tuple[int, Combo]]) -> None:
        super().__init__()
        assert pool.pages.ends is not None
        self.base, self.pages, self.segments = base, pool.pages.ends, build_segments(runs)

    def forward(self, token_ids: Tensor) -> Tensor:
        y = self.base(token_ids)
        rows = y.view(-1, y.shape[-1])
        lora_embed(rows, token_ids.reshape(-1), self.base.num_embeddings, self.pages, self.segments)
        return y


@torch.no_grad()
def served(
    model: PreTrainedModel, layout: ModelLayout, pool: PagePool, token_ids: Tensor, combos: Sequence[Combo]
) -> Tensor:
    """Logits [rows, T, V] of rows with these combos."""
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    runs = [(token_ids.shape[1], combo) for combo in combos]
    for layer, site in (*layout.linears(), (ENDS, "lm_head")):
        path = layout.module_path(layer, site)
        parent, _, leaf = path.rpartition(".")
        setattr(modules[parent], leaf, WithPages(modules[path], pool, layer, site, runs))
    copied.model.embed_tokens = EmbeddingWithPages(copied.model.embed_tokens, pool, runs)
    return copied(token_ids).logits
