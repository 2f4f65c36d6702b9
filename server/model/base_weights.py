"""The decoder's linears one by one, dequantized: what adapter methods compute with that depend on the base."""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.adapters.layout import ENDS, Linear
from lorry.server.model.decoder import Decoder

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_PLACES = {site: (group, index) for group, sites in enumerate(_GROUPS) for index, site in enumerate(sites)}


class DecoderWeights:
    """`lorry.adapters.reading.base.BaseWeights` of a decoder; reads it only, from any thread."""

    def __init__(self, decoder: Decoder) -> None:
        self._projections = decoder.projections
        self._decoder = decoder
        self.vocab_size = decoder.config.vocab_size

    def weight(self, linear: Linear) -> Tensor:
        if linear[0] == ENDS:
            everything = torch.arange(self.vocab_size)
            return self.embedding(everything).T if linear[1] == "embed_tokens" else self.head(everything)
        return self._part(linear)[0]

    def embedding(self, ids: Tensor) -> Tensor:
        return self._decoder.embedding_rows(ids)

    def head(self, ids: Tensor) -> Tensor:
        return self._decoder.head_rows(ids)

    def bias(self, linear: Linear) -> Tensor | None:
        return None if linear[0] == ENDS else self._part(linear)[1]

    def _part(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        layer, site = linear
        group, index = _PLACES[site]
        return self._projections[layer * len(_GROUPS) + group].part(index)
