"""What the decoder and the writer ask of a checkpoint, whatever its format: tensors under Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lorry.adapters.layout import ModelLayout
from lorry.kernels.lora import SITES
from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head"

LinearWeight = NF4Weight | Tensor


class Checkpoint(Protocol):
    """Tensors of one model, read one at a time.

    Both readers raise MalformedCheckpoint naming the tensor that is missing or has another shape. `close` raises
    it too, for a tensor that nobody asked for: a checkpoint is read whole or not at all.
    """

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A floating-point tensor of exactly this shape, in the dtype in which it is stored."""

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        """The weight [N, K] of a linear: NF4, or floating point where the checkpoint keeps it so."""

    def close(self) -> None:
        """Assert that every tensor was read, and let go of the files."""


class CheckpointView:
    """A `Checkpoint` that shows `source` as it is; whoever inherits changes how linears are read."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.tensor(name, shape)

    def linear(self, module: str, shape: tuple[int, int]) -> LinearWeight:
        return self._source.linear(module, shape)

    def close(self) -> None:
        self._source.close()


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; `linears` and `biases` are keyed by site."""

    input_norm: Tensor  # [H]
    post_norm: Tensor  # [H]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    linears: dict[str, LinearWeight]
    biases: dict[str, Tensor]


def norm_names(config: ModelConfig, layer: int) -> dict[str, tuple[str, int]]:
    """Field of LayerWeights → (tensor name, length) of the norms that this layer has."""
    prefix = f"model.layers.{layer}"
    names = {
        "input_norm": (f"{prefix}.input_layernorm.weight", config.hidden_size),
        "post_norm": (f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
    }
    if config.qk_norm:
        names["q_norm"] = (f"{prefix}.self_attn.q_norm.weight", config.head_dim)
        names["k_norm"] = (f"{prefix}.self_attn.k_norm.weight", config.head_dim)
    return names


def read_layer(checkpoint: Checkpoint, layer: int) -> LayerWeights:
    """Read one layer; raises MalformedCheckpoint naming the tensor that is missing or has another shape."""
    config = checkpoint.config
    shapes = config.linear_shapes()
    norms = {field: checkpoint.tensor(name, (size,)) for field, (name, size) in norm_names(config, layer).items()}
    linears = {site: checkpoint.linear(ModelLayout.module_path(layer, site), shapes[site]) for site in SITES}
    biases = {
        site: checkpoint.tensor(f"{ModelLayout.module_path(layer, site)}.bias", (shapes[site][0],))
        for site in SITES
        if config.biased(site)
    }
    return LayerWeights(
        input_norm=norms["input_norm"],
        post_norm=norms["post_norm"],
        q_norm=norms.get("q_norm"),
        k_norm=norms.get("k_norm"),
        linears=linears,
        biases=biases,
    )


@dataclass(frozen=True)
class EndWeights:
    """What stands before the first layer and behind the last; `head` is None where it is the embedding."""

    embedding: Tensor  # [V, H]
    final_norm: Tensor  # [H]
    head: LinearWeight | None  # [V, H]


def read_ends(checkpoint: Checkpoint) -> EndWeights:
    """Read embedding, final norm and head."""
    config = checkpoint.config
    shape = (config.vocab_size, config.hidden_size)
    return EndWeights(
        embedding=checkpoint.tensor(EMBEDDING, shape),
        final_norm=checkpoint.tensor(FINAL_NORM, (config.hidden_size,)),
        head=None if config.tie_embeddings else checkpoint.linear(HEAD, shape),
    )


def layout_of(config: ModelConfig) -> ModelLayout:
    """The linears that adapters can change: site → (K, N)."""
    shapes = config.linear_shapes()
    vocabulary, hidden = config.vocab_size, config.hidden_size
    return ModelLayout(
        layers=config.layers,
        sites={site: (shapes[site][1], shapes[site][0]) for site in SITES},
        ends={"embed_tokens": (vocabulary, hidden), "lm_head": (hidden, vocabulary)},
        tied=config.tie_embeddings,
    )
