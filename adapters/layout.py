"""The linears of a base model that adapters can change: how many layers, and K inputs and N outputs of each site.

The embedding is one of them, a linear of one-hot vectors: V inputs, H outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lorry.kernels.lora import END_SITES, SITES, page_elements, vector_elements

Linear = tuple[int, str]
"""One adapted linear: (layer, site); the layer of `END_SITES` is ENDS."""

ENDS = -1

MAX_RANK = 256

PAGE_DTYPES = {
    "auto": torch.bfloat16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""Of rank pages, by the names that a configuration has."""

_BLOCK = {site: "mlp" if site in ("gate_proj", "up_proj", "down_proj") else "self_attn" for site in SITES}
_END_PATHS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
_PATH = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(self_attn|mlp)\.([a-z]+_proj)")


@dataclass(frozen=True)
class ModelLayout:
    """Shapes of the adaptable linears.

    layers: decoder layers. sites: site name → (K inputs, N outputs), names from `SITES`. base: the model's name,
    which no adapter may bear as its id. fingerprint: of its quantized linears, "" where nothing is to be compared;
    allow_base_mismatch: an adapter that names another is only warned of. ends: as sites, of `END_SITES`; tied: the head
    is the embedding's matrix.
    """

    layers: int
    sites: dict[str, tuple[int, int]]
    base: str = ""
    fingerprint: str = ""
    allow_base_mismatch: bool = False
    ends: dict[str, tuple[int, int]] = field(default_factory=dict)
    tied: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.sites) - set(SITES) | set(self.ends) - set(END_SITES)
        if unknown:
            raise ValueError(f"unknown sites {sorted(unknown)}, known are {', '.join((*SITES, *END_SITES))}")

    def linears(self) -> Iterator[Linear]:
        """Every (layer, site) but the ends, layer by layer, sites in the order of `SITES`."""
        return ((layer, site) for layer in range(self.layers) for site in SITES if site in self.sites)

    def shape(self, site: str) -> tuple[int, int]:
        """(K, N) of a site of a layer or of an end."""
        return self.sites[site] if site in self.sites else self.ends[site]

    def page_elements(self, site: str, dtype: torch.dtype = torch.bfloat16) -> int:
        """Elements of one rank page: A [16, K] and B [16, N], in 8 bits scales too."""
        return page_elements(*self.shape(site), dtype)

    def vector_elements(self, site: str, dtype: torch.dtype) -> int:
        """Elements of `dtype` of a vector page: gain [N] and shift [N] in float32."""
        return vector_elements(self.shape(site)[1], dtype)

    @staticmethod
    def module_path(layer: int, site: str) -> str:
        """The module's name in transformers, such as "model.layers.0.self_attn.q_proj"."""
        return _END_PATHS[site] if layer == ENDS else f"model.layers.{layer}.{_BLOCK[site]}.{site}"

    @staticmethod
    def parse(path: str) -> Linear | None:
        """The inverse of `module_path`, whatever the number of layers; None for other modules."""
        for site, end in _END_PATHS.items():
            if path == end:
                return ENDS, site
        match = _PATH.fullmatch(path)
        if match is None or _BLOCK.get(match[3]) != match[2]:
            return None
        return int(match[1]), match[3]

    def max_weight_bytes(self) -> int:
        """Bytes of the largest adapter file that is read: rank 256, float32, every linear, and of each output two
        numbers more: a bias, and a magnitude or a bias of B; and embedding and head whole, beside the base's own.

        Matrices that an adapter has in place of a layer's own must find room in that.
        """
        shapes = [*self.sites.values()] * self.layers + [*self.ends.values()]
        return 4 * sum([MAX_RANK * (k + n) + 2 * n for k, n in shapes] + [2 * k * n for k, n in self.ends.values()])
