"""The shape of the tiny models that several tests here save, quantize and read."""

from __future__ import annotations

from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}
