"""The decoder of the Llama family: one layer function for every model that `ModelConfig` can describe.

    h_0 = E[token]
    a_l = h_l + O · attention(rope(norm(Q x)), rope(norm(K x)), V x),    x = RMSNorm(h_l)
    h_{l+1} = a_l + Down · (silu(Gate z) ⊙ Up z),                        z = RMSNorm(a_l)
    logits = Head · RMSNorm(h_L)

Q, K, V and Gate, Up are one product each; the biases, the norms of q and k and the sliding window are there or not,
as the config says. Adapters add Σ_j w_j s_j (x A_jᵀ) B_j to the outputs of the seven linears, of E and of Head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.adapters.layout import ModelLayout
from lorry.kernels.kv_store import qkv_finish
from lorry.kernels.layers import GROUPS, Layers, LayerWeights
from lorry.kernels.linear import DenseLinear, dense_linear, embed
from lorry.kernels.lora import (
    SITES,
    AdapterPages,
    LoraTerm,
    Segments,
    Site,
)
from lorry.kernels.nf4_linear import Products
from lorry.kernels.paged_attention import paged_attention
from lorry.kernels.rms_norm import rms_norm
from lorry.kernels.silu_mul import silu_mul
from lorry.server.model.config import ModelConfig
from lorry.server.model.errors import UnsupportedModel
from lorry.server.model.inputs import ModelInputs
from lorry.server.model.placement import Placement
from lorry.server.model.projection import Projection, nf4_bytes
from lorry.server.model.step import KeyValueCache, Step, adapters_of, add_to_embeddings, add_to_logits
from lorry.server.model.weights import Checkpoint, layout_of, read_ends, read_layer
from lorry.server.model.writer import Progress


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer, ready for the kernels."""

    index: int
    input_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection
    sliding_window: int


class Decoder:
    """A loaded model. Build it with `load_model`; everything it is asked for goes through arguments.

    `config`: its shape; `layout`: the linears that adapters can change; `dtype`: of activations; `device`;
    `fingerprint`: of the quantized base, "" where `load_model` has set none.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[Layer],
        embedding: DenseLinear,
        final_norm: Tensor,
        head: Projection | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.fingerprint = ""
        self.dtype = dtype
        self.device = device
        shapes = config.linear_shapes()
        self._layers = tuple(layers)
        self._embedding = embedding
        self._final_norm = final_norm
        self._head = head
        self._rope_table = config.rope.table(config.head_dim, config.context_length).to(device)
        self._scale = config.head_dim**-0.5
        self._qkv_sites = _sites(shapes, ("q_proj", "k_proj", "v_proj"))
        self._o_sites = _sites(shapes, ("o_proj",))
        self._gate_up_sites = _sites(shapes, ("gate_proj", "up_proj"))
        self._down_sites = _sites(shapes, ("down_proj",))
        groups = (self._qkv_sites, self._o_sites, self._gate_up_sites, self._down_sites)
        self._widths = [(shapes[SITES[group[0].index]][1], len(group)) for group in groups]
        self._fused = self._fuse()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        products: Products = "float32",
        context_length: int | None = None,
        progress: Progress | None = None,
    ) -> Decoder:
        """Read every layer once; raises MalformedCheckpoint, and UnsupportedModel for a `context_length` beyond
        the model's."""
        config, device = checkpoint.config, torch.device(device)
        if context_length is not None:
            if not 1 <= context_length <= config.context_length:
                raise UnsupportedModel(
                    f"context_length {context_length} is not within the model's {config.context_length}",
                    field="context_length",
                )
            config = dataclasses.replace(config, context_length=context_length)
        dense_dtype = dtype if dtype.itemsize < 4 else None
        placement = Placement(device)
        embedding, final_norm, head = _read_ends(checkpoint, placement, dtype, dense_dtype)
        layers = []
        for index in range(config.layers):
            layers.append(_read_layer(checkpoint, index, placement, dtype, dense_dtype, products))
            if progress:
                progress("load", index + 1, config.layers)
        checkpoint.close()
        return cls(config, layers, embedding, final_norm, head, dtype, device)

    def forward(self, inputs: ModelInputs, kv: KeyValueCache, pages: AdapterPages | None = None) -> Tensor:
        """Hidden states [T, H] after the final norm, in `dtype`; stores this step's keys and values into `kv`.

        `pages` may be None only where `inputs.segments` is.
        """
        return self.forward_tapped(inputs, kv, pages)[0]

    def forward_tapped(
        self, inputs: ModelInputs, kv: KeyValueCache, pages: AdapterPages | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, and the stream [P, H] before each of the layers `inputs.taps`, at `inputs.tap_rows`. With taps the
        layers are called one by one, to the same bits."""
        hidden = embed(inputs.token_ids, self._embedding, self.dtype)
        add_to_embeddings(hidden, inputs, pages, self.config.vocab_size)
        residual, term, tapped = None, None, list[Tensor]()
        if not inputs.taps and self._fused is not None and self._fused.take(kv.keys, kv.values):
            batch = (inputs.positions, inputs.slot_mapping, inputs.block_tables, inputs.cu_seqlens_q, inputs.kv_lens)
            hidden, residual = self._fused.forward(hidden, *batch, pages, inputs.segments)
        else:
            step = Step(inputs, kv, adapters_of(inputs, pages, self._widths))
            for layer in self._layers:
                hidden, residual, term = self._layer(layer, hidden, residual, term, step)
            tapped = step.tapped
        return _add_norm(hidden, self._final_norm, self.config.rms_eps, residual, term)[0], tapped

    def logits(
        self,
        hidden: Tensor,
        out: Tensor | None = None,
        segments: Segments | None = None,
        pages: AdapterPages | None = None,
    ) -> Tensor:
        """Head over hidden states [R, H] → float32 [R, V], in `out` where that is given.

        segments: of these rows, as `ModelInputs.logits_segments`; `pages` may be None only where they are.
        """
        head = self._head
        logits = dense_linear(hidden, self._embedding) if head is None else head.project(hidden)
        logits = logits.float() if out is None else out.copy_(logits)
        add_to_logits(logits, hidden, segments, pages)
        return logits

    def _fuse(self) -> Layers | None:
        """The layers as one call of the CPU kernels, where these can do all of them."""
        config = self.config
        layers = []
        for layer in self._layers:
            products = [piece for p in (layer.qkv, layer.o, layer.gate_up, layer.down) for piece in p.pieces]
            norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            layers.append(LayerWeights(tuple(products), *norms, layer.sliding_window))
        whole = all(len(layer.products) == GROUPS for layer in layers)
        if not whole or not Layers.serve(layers, config.heads, config.kv_heads, config.head_dim):
            return None
        return Layers(
            layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            width=config.head_dim,
            eps=config.rms_eps,
            scale=self._scale,
            cos_sin=self._rope_table,
            sites=(self._qkv_sites, self._o_sites, self._gate_up_sites, self._down_sites),
        )

    def _layer(
        self, layer: Layer, hidden: Tensor, residual: Tensor | None, last: LoraTerm | None, step: Step
    ) -> tuple[Tensor, Tensor, LoraTerm | None]:
        """hidden [T, H] and the LoRA term `last`: what the layer before has still to add to the stream `residual`."""
        config, inputs = self.config, step.inputs
        keys, values = step.kv.keys[layer.index], step.kv.values[layer.index]
        normed, residual = _add_norm(hidden, layer.input_norm, config.rms_eps, residual, last)
        step.tap(layer.index, residual)

        qkv, term = step.project(layer.qkv, normed, layer.index, self._qkv_sites)  # [T, (Hq + 2 Hk) D]
        q = qkv_finish(
            qkv,
            inputs.positions,
            self._rope_table,
            keys,
            values,
            inputs.slot_mapping,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=config.rms_eps,
            lora=term,
        )
        mixed = paged_attention(
            q,
            keys,
            values,
            inputs.block_tables,
            inputs.cu_seqlens_q,
            inputs.kv_lens,
            self._scale,
            layer.sliding_window,
            max_query_len=inputs.max_query_len,
        ).flatten(1)
        attended, term = step.project(layer.o, mixed, layer.index, self._o_sites)
        normed, residual = _add_norm(attended, layer.post_norm, config.rms_eps, residual, term)

        gate_up, term = step.project(layer.gate_up, normed, layer.index, self._gate_up_sites)
        gated = silu_mul(gate_up, term)
        out, term = step.project(layer.down, gated, layer.index, self._down_sites)
        return out, residual, term

    @property
    def layout(self) -> ModelLayout:
        """The linears that adapters can change: site → (K, N)."""
        return layout_of(self.config)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the embedding is the head as well."""
        return self._head is None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The fused linears of all layers, first layer first."""
        return tuple(p for layer in self._layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down))

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """float32 [n, H] in host memory, the embeddings of token ids [n]."""
        return embed(ids.to(self.device), self._embedding, self._embedding.dtype).to("cpu", torch.float32, copy=True)

    def head_rows(self, ids: Tensor) -> Tensor:
        """The same of the head's matrix."""
        return self.embedding_rows(ids) if self._head is None else self._head.part(0)[0][ids]

    @property
    def bits_per_linear_weight(self) -> float:
        """8 * bytes held for the NF4 linears of the layers / their weights, tables included; 0 when there is none."""
        weights = sum(projection.nf4_weights for projection in self.projections)
        return 8 * nf4_bytes(self.projections) / weights if weights else 0.0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        linears = [*self.projections, *([self._head] if self._head else [])]
        dense = sum(p.dense_bytes for p in linears) + self._embedding.nbytes + sum(n.nbytes for n in self._norms())
        return nf4_bytes(linears) + dense

    @property
    def step_bytes(self) -> int:
        """Those of them that every step reads: not an embedding that is not the head as well."""
        return self.weight_bytes - (0 if self._head is None else self._embedding.nbytes)

    @property
    def parameters(self) -> int:
        """Weights and biases of the model; tied embeddings count once."""
        linears = [*self.projections, *([self._head] if self._head else [])]
        embedding = self.config.vocab_size * self.config.hidden_size
        return sum(p.parameters for p in linears) + embedding + sum(norm.numel() for norm in self._norms())

    def _norms(self) -> list[Tensor]:
        norms = [n for la in self._layers for n in (la.input_norm, la.post_norm, la.q_norm, la.k_norm)]
        return [norm for norm in (*norms, self._final_norm) if norm is not None]


def _add_norm(
    hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None, lora: LoraTerm | None
) -> tuple[Tensor, Tensor]:
    """residual += hidden + LoRA sum, then RMSNorm; before the first layer the stream is `hidden` itself."""
    if residual is None:
        return rms_norm(hidden, weight, eps), hidden
    return rms_norm(hidden, weight, eps, residual, lora)


def _sites(shapes: dict[str, tuple[int, int]], names: tuple[str, ...]) -> tuple[Site, ...]:
    """Where the outputs of linears fused in this order lie in the columns of y."""
    sites, start = [], 0
    for name in names:
        size = shapes[name][0]
        sites.append(Site(index=SITES.index(name), start=start, size=size))
        start += size
    return tuple(sites)


def _read_ends(
    checkpoint: Checkpoint, placement: Placement, dtype: torch.dtype, dense_dtype: torch.dtype | None
) -> tuple[DenseLinear, Tensor, Projection | None]:
    """Embedding, final norm and head on the device; what they were read from is let go."""
    ends, device = read_ends(checkpoint), placement.device
    embedding = DenseLinear(ends.embedding.to(device, dense_dtype or ends.embedding.dtype))
    head = None if ends.head is None else Projection([placement.place(ends.head)], None, dense_dtype)
    return embedding, ends.final_norm.to(device, dtype), head


def _read_layer(
    checkpoint: Checkpoint,
    index: int,
    placement: Placement,
    dtype: torch.dtype,
    dense_dtype: torch.dtype | None,
    products: Products,
) -> Layer:
    weights, device = read_layer(checkpoint, index), placement.device

    def fused(*sites: str) -> Projection:
        biases = [weights.biases[site].to(device) if site in weights.biases else None for site in sites]
        return Projection([placement.place(weights.linears[site]) for site in sites], biases, dense_dtype, products)

    def norm(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.to(device, dtype)

    return Layer(
        index=index,
        input_norm=weights.input_norm.to(device, dtype),
        qkv=fused("q_proj", "k_proj", "v_proj"),
        q_norm=norm(weights.q_norm),
        k_norm=norm(weights.k_norm),
        o=fused("o_proj"),
        post_norm=weights.post_norm.to(device, dtype),
        gate_up=fused("gate_proj", "up_proj"),
        down=fused("down_proj"),
        sliding_window=checkpoint.config.sliding_windows[index],
    )
