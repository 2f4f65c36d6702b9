"""The decoder's linears one by one, dequantized: what adapter methods compute with that depend on the base."""

from __future__ import annotations

from torch import Tensor

from lorry.adapters.layout import Linear
from lorry.server.model.decoder import Decoder

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_PLACES = {site: (group, index) for group, sites in enumerate(_GROUPS) for index, site in enumerate(sites)}


class DecoderWeights:
    """`lorry.adapters.reading.base.BaseWeights` of a decoder; reads it only, from any thread."""

    def __init__(self, decoder: Decoder) -> None:
        self._projections = decoder.projections

    def weight(self, linear: Linear) -> Tensor:
        return self._part(linear)[0]

    def bias(self, linear: Linear) -> Tensor | None:
        return self._part(linear)[1]

    def _part(self, linear: Linear) -> tuple[Tensor, Tensor | None]:
        layer, site = linear
        group, index = _PLACES[site]
        return self._projections[layer * len(_GROUPS) + group].part(index)
