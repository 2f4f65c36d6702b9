"""Every layer of a decoder in one call on the CPU: the kernels of this folder in the order in which
`lorry.server.model.decoder` calls them, hence the same bits, without the way through Python between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.kernels import native
from lorry.kernels.kv_store import fits_kernels
from lorry.kernels.linear import DenseLinear
from lorry.kernels.lora import AdapterPages, Segments, Site, site_table
from lorry.kernels.nf4_linear import NF4Linear
from lorry.kernels.paged_attention import BLOCK_SIZE, MAX_GROUP, MAX_HEAD_DIM

GROUPS = 4  # q, k and v; o; gate and up; down
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_BAD_POSITION, _BAD_SLOT = 1, 2


class _Layer(ctypes.Structure):
    """struct layer of csrc/layers.c."""

    _fields_ = (
        ("linears", _POINTER * GROUPS),
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("keys", _POINTER),
        ("values", _POINTER),
        ("window", _INT),
    )


class _Layers(ctypes.Structure):
    """struct layers of csrc/layers.c."""

    _fields_ = (
        ("layers", _POINTER),
        ("count", _INT),
        ("hidden", _INT),
        ("heads", _INT),
        ("kv_heads", _INT),
        ("d", _INT),
        ("intermediate", _INT),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
        ("cos_sin", _POINTER),
        ("positions", _INT),
        ("cache_type", _INT),
        ("cache_blocks", _INT),
        ("called", _POINTER * GROUPS),
        ("called_count", _INT * GROUPS),
    )


class _Step(ctypes.Structure):
    """struct step of csrc/layers.c."""

    _fields_ = (
        ("tokens", _INT),
        ("sequences", _INT),
        ("table_stride", _INT),
        ("positions", _POINTER),
        ("slots", _POINTER),
        ("block_tables", _POINTER),
        ("cu_seqlens", _POINTER),
        ("kv_lens", _POINTER),
        ("arena", _POINTER),
        ("arena_type", _INT),
        ("offsets", _POINTER),
        ("scaling", _POINTER),
        ("sites", _INT),
        ("max_pages", _INT),
        ("starts", _POINTER),
        ("adapter_slots", _POINTER),
        ("weights", _POINTER),
        ("segments", _INT),
        ("adapters", _INT),
    )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: its fused products (q k v, o, gate up, down) and float32 norms, those of q and k or None."""

    products: tuple[NF4Linear | DenseLinear, ...]
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    sliding_window: int

    @property
    def native(self) -> bool:
        """Whether the CPU kernels can do all of it."""
        norms = (self.input_norm, self.post_norm, self.q_norm, self.k_norm)
        return all(product.native for product in self.products) and all(
            norm is None or (norm.is_cpu and norm.dtype is torch.float32) for norm in norms
        )


class Layers:
    """All layers. heads, kv_heads, width: of attention; scale: of its scores; cos_sin: float32 [positions, width];
    sites: the adapted linears of each product, as `lora_add` takes them."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        heads: int,
        kv_heads: int,
        width: int,
        eps: float,
        scale: float,
        cos_sin: Tensor,
        sites: Sequence[tuple[Site, ...]],
    ) -> None:
        self._kept = (list(layers), cos_sin)  # what the structs point to
        self._structs = (_Layer * len(layers))(*map(_describe, layers))
        self._keys: list[Tensor] | None = None
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.hidden = layers[0].products[1].out_features
        tables = [site_table(group) for group in sites]
        self._plan = _Layers(
            layers=ctypes.addressof(self._structs),
            count=len(layers),
            hidden=self.hidden,
            heads=heads,
            kv_heads=kv_heads,
            d=width,
            intermediate=layers[0].products[3].in_features,
            eps=eps,
            scale=scale,
            cos_sin=cos_sin.data_ptr(),
            positions=cos_sin.shape[0],
            called=(_POINTER * GROUPS)(*map(ctypes.addressof, tables)),
            called_count=(_INT * GROUPS)(*map(len, sites)),
        )

    @staticmethod
    def serve(layers: Sequence[LayerWeights], heads: int, kv_heads: int, width: int) -> bool:
        """Whether the CPU kernels can do these layers."""
        return (
            native.library() is not None
            and all(layer.native for layer in layers)
            and width % 16 == 0
            and width <= MAX_HEAD_DIM
            and heads // kv_heads <= MAX_GROUP
        )

    def take(self, keys: list[Tensor], values: list[Tensor]) -> bool:
        """Whether these caches, one of each for each layer, suit the CPU kernels; they are used from now on."""
        if keys is self._keys:
            return True
        if not all(map(fits_kernels, keys, values)) or keys[0].shape[2] != BLOCK_SIZE:
            return False
        self._keys = keys
        self._plan.cache_type = native.CACHE_TYPES[keys[0].dtype]
        self._plan.cache_blocks = keys[0].shape[0]
        for struct, key, value in zip(self._structs, keys, values, strict=True):
            struct.keys, struct.values = key.data_ptr(), value.data_ptr()
        return True

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        kv_lens: Tensor,
        pages: AdapterPages | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(what the last layer adds, the stream it adds to), float32 [T, H] each, from embeddings `hidden`, which are
        overwritten; the other arguments as in `rope`, `kv_store`, `paged_attention` and `lora_add`.

        Raises IndexError for a position or a slot that is not there; then the caches hold part of the step.
        """
        library = native.library()
        assert library is not None and self._keys is not None
        assert positions.dtype is slot_mapping.dtype is torch.int64
        assert block_tables.dtype is cu_seqlens_q.dtype is kv_lens.dtype is torch.int32
        tensors = [positions.contiguous(), slot_mapping.contiguous(), cu_seqlens_q.contiguous(), kv_lens.contiguous()]
        step = _Step(
            tokens=hidden.shape[0],
            sequences=len(kv_lens),
            table_stride=block_tables.stride()[0],
            positions=tensors[0].data_ptr(),
            slots=tensors[1].data_ptr(),
            block_tables=block_tables.data_ptr(),
            cu_seqlens=tensors[2].data_ptr(),
            kv_lens=tensors[3].data_ptr(),
        )
        if segments is not None:
            assert pages is not None, "segments without pages"
            step.arena, step.arena_type = pages.arena.data_ptr(), native.PAGE_TYPES[pages.arena.dtype]
            step.offsets, step.scaling = pages.offsets.data_ptr(), pages.scaling.data_ptr()
            step.sites, step.max_pages = pages.offsets.shape[2], pages.offsets.shape[3]
            step.starts, step.adapter_slots = segments.starts.data_ptr(), segments.slots.data_ptr()
            step.weights = segments.weights.data_ptr()
            step.segments, step.adapters = segments.slots.shape
        out = torch.empty(hidden.shape[0], self.hidden)
        status = library.layers_forward(
            ctypes.addressof(self._plan), ctypes.addressof(step), hidden.data_ptr(), out.data_ptr()
        )
        if status == _BAD_POSITION:
            raise IndexError(f"positions must lie in 0..{self._plan.positions - 1}")
        if status == _BAD_SLOT:
            raise IndexError(f"slot_mapping must lie in -1..{self._plan.cache_blocks * BLOCK_SIZE - 1}")
        native.check(status)
        return out, hidden


def _describe(layer: LayerWeights) -> _Layer:
    norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
    return _Layer(
        (_POINTER * GROUPS)(*(product.plan for product in layer.products)),
        *(None if norm is None else norm.data_ptr() for norm in norms),
        window=layer.sliding_window,
    )
