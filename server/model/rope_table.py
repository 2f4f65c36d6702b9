"""Rotary position embedding: which angle each pair of head dimensions turns by at each position.

    angle[p, i] = p * inv_freq[i],   table[p] = [cos(angle[p]) | sin(angle[p])] * attention_factor

with `inv_freq[i] = theta^(-2i/D)` changed by the scaling that the config names. Every scaling served here is a
fixed function of the config. Scalings that depend on the length of the sequence (dynamic NTK, LongRoPE) would
make cached keys wrong when the sequence grows and are refused by name.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), the `rope_type`s of Hugging Face transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorry.server.model.errors import UnsupportedModel

SERVED = ("default", "linear", "llama3", "yarn")

_KNOWN_KEYS = {
    "default": {"rope_theta", "partial_rotary_factor"},
    "linear": {"rope_theta", "partial_rotary_factor", "factor"},
    "llama3": {
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    },
}


@dataclass(frozen=True)
class Rope:
    """Parameters of the rotation; `kind` is one of `SERVED`, the rest is read only where that kind needs it."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0  # tokens
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], context_length: int) -> Rope:
        """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before) of a config.json.

        Raises UnsupportedModel naming the rope type or the key that is not served.
        """
        raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if any(isinstance(value, Mapping) for value in raw.values()):
            raise UnsupportedModel(
                "rope_parameters per layer type are not served; one set for all layers is",
                field="rope_parameters",
            )
        kind = raw.get("rope_type") or raw.get("type") or "default"
        if kind not in SERVED:
            raise UnsupportedModel(f"rope type {kind!r} is not served; served: {', '.join(SERVED)}", field="rope_type")
        values = {key: value for key, value in raw.items() if value is not None and key not in ("rope_type", "type")}
        values.setdefault("rope_theta", config.get("rope_theta", 10000.0))
        if config.get("partial_rotary_factor") is not None:
            values.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
        unknown = sorted(set(values) - _KNOWN_KEYS[kind])
        if unknown:
            raise UnsupportedModel(f"rope type {kind!r} with {unknown[0]!r} is not served", field=unknown[0])
        if values.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(
                f"partial_rotary_factor {values['partial_rotary_factor']} is not served; 1.0 is",
                field="partial_rotary_factor",
            )
        original = int(
            config.get("original_max_position_embeddings")
            or values.get("original_max_position_embeddings")
            or context_length
        )
        theta = float(values["rope_theta"])
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            return cls(theta=theta, kind=kind, factor=_required(values, kind, "factor"))
        if kind == "llama3":
            return cls(
                theta=theta,
                kind=kind,
                factor=_required(values, kind, "factor"),
                low_freq_factor=_required(values, kind, "low_freq_factor"),
                high_freq_factor=_required(values, kind, "high_freq_factor"),
                original_context=original,
            )
        factor = float(values.get("factor", context_length / original))
        return cls(
            theta=theta,
            kind=kind,
            factor=factor,
            original_context=original,
            attention_factor=_yarn_attention_factor(values, factor),
            beta_fast=float(values.get("beta_fast") or 32),
            beta_slow=float(values.get("beta_slow") or 1),
            truncate=bool(values.get("truncate", True)),
        )

    def inv_freq(self, head_dim: int) -> Tensor:
        """Radians per position of each pair of dimensions: float32 `[head_dim / 2]`."""
        base = self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        inv_freq = 1.0 / base
        if self.kind == "linear":
            return inv_freq / self.factor
        if self.kind == "llama3":
            return self._llama3(inv_freq)
        if self.kind == "yarn":
            return self._yarn(base)
        return inv_freq

    def table(self, head_dim: int, positions: int) -> Tensor:
        """Cosines in `[:, :head_dim/2]`, sines in `[:, head_dim/2:]`: float32 `[positions, head_dim]`."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.inv_freq(head_dim)
        return torch.cat((angles.cos() * self.attention_factor, angles.sin() * self.attention_factor), dim=1)

    def _llama3(self, inv_freq: Tensor) -> Tensor:
        """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
        wavelength = 2 * math.pi / inv_freq
        longest_kept = self.original_context / self.high_freq_factor
        shortest_stretched = self.original_context / self.low_freq_factor
        blend = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * inv_freq / self.factor + blend * inv_freq
        scaled = torch.where(wavelength > shortest_stretched, inv_freq / self.factor, blended)
        return torch.where(wavelength < longest_kept, inv_freq, scaled)

    def _yarn(self, base: Tensor) -> Tensor:
        """Dimensions that turn more than `beta_fast` times over the original context are kept, those that turn
        less than `beta_slow` times are stretched by `factor`, a linear ramp between."""
        head_dim = 2 * base.numel()

        def dimension(rotations: float) -> float:
            turns = self.original_context / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        span = (high - low) or 0.001
        stretched = ((torch.arange(base.numel(), dtype=torch.float32) - low) / span).clamp(0, 1)
        kept = 1 - stretched
        return 1.0 / (self.factor * base) * (1 - kept) + 1.0 / base * kept


def _required(values: Mapping[str, Any], kind: str, key: str) -> float:
    if key not in values:
        raise UnsupportedModel(f"rope type {kind!r} needs {key!r}", field=key)
    return float(values[key])


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """The paper's `0.1 ln(factor) + 1`, unless the config gives the value or DeepSeek's two `mscale`s."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return magnitude(float(values["mscale"])) / magnitude(float(values["mscale_all_dim"]))
    return magnitude(1.0)
