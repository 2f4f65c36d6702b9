"""A model of transformers whose linears are followed by this server's adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import ModelLayout
from lorry.adapters.segments import Combo, build_segments
from lorry.kernels.lora import SITES, Site, lora_add


def layout_of(model: PreTrainedModel) -> ModelLayout:
    """The layout of a model of the Llama family."""
    modules = dict(model.named_modules())
    linears = {site: modules[ModelLayout.module_path(0, site)] for site in SITES}
    shapes = {site: (linear.in_features, linear.out_features) for site, linear in linears.items()}
    return ModelLayout(model.config.num_hidden_layers, shapes)


class WithPages(nn.Module):
    """A linear of transformers with this server's update behind it."""

    def __init__(
        self, base: nn.Linear, pool: PagePool, layer: int, site: str, runs: Sequence[tuple[int, Combo]]
    ) -> None:
        super().__init__()
        self.base, self.pool, self.layer = base, pool, layer
        self.site = Site(SITES.index(site), 0, base.out_features)
        self.segments = build_segments(runs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows = y.view(-1, y.shape[-1])
        lora_add(rows, x.reshape(-1, x.shape[-1]), self.pool.pages, self.layer, (self.site,), self.segments)
        return y


@torch.no_grad()
def served(
    model: PreTrainedModel, layout: ModelLayout, pool: PagePool, token_ids: Tensor, combos: Sequence[Combo]
) -> Tensor:
    """Logits [rows, T, V] of rows with these combos."""
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    runs = [(token_ids.shape[1], combo) for combo in combos]
    for layer, site in layout.linears():
        path = layout.module_path(layer, site)
        parent, _, leaf = path.rpartition(".")
        setattr(modules[parent], leaf, WithPages(modules[path], pool, layer, site, runs))
    return copied(token_ids).logits
