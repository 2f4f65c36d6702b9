"""What each choice of number types does to the default model's log-probabilities, teacher-forced.

    python bench/fidelity.py [--text FILE] [--model NAME]

The first row, float32 products over a float32 cache, is the reference of all others: transformers computes the same
(tests/model/test_smollm2.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from lorry.kernels.nf4_linear import Products
from lorry.server.cache.blocks import blocks_for
from lorry.server.cache.kv_cache import KVCache
from lorry.server.model.decoder import Decoder
from lorry.server.model.inputs import ModelInputs
from lorry.server.model.load import load_model
from lorry.server.model.store import DEFAULT_MODEL, resolve_model

REPOSITORY = Path(__file__).resolve().parents[1]
CHUNK = 256
CHOICES: tuple[tuple[str, torch.dtype, Products, torch.dtype], ...] = (
    ("float32, cache float32", torch.float32, "float32", torch.float32),
    ("int16, cache float32", torch.float32, "int16", torch.float32),
    ("float32, cache bfloat16", torch.float32, "float32", torch.bfloat16),
    ("int16, cache bfloat16", torch.float32, "int16", torch.bfloat16),
    ("float32, cache e4m3", torch.float32, "float32", torch.float8_e4m3fn),
    ("int16, cache e4m3", torch.float32, "int16", torch.float8_e4m3fn),
    ("all in bfloat16", torch.bfloat16, "float32", torch.bfloat16),
    ("bfloat16, cache e4m3", torch.bfloat16, "float32", torch.float8_e4m3fn),
)


def log_probabilities(decoder: Decoder, ids: list[int], kv_dtype: torch.dtype) -> Tensor:
    """float32 [len(ids), V] of one sequence, prefilled in chunks."""
    config = decoder.config
    blocks = blocks_for(len(ids))
    cache = KVCache(config.layers, config.kv_heads, config.head_dim, blocks, kv_dtype)
    table = torch.arange(blocks, dtype=torch.int32).view(1, blocks)
    rows = []
    for start in range(0, len(ids), CHUNK):
        positions = torch.arange(start, min(len(ids), start + CHUNK))
        inputs = ModelInputs(
            token_ids=torch.tensor(ids)[positions],
            positions=positions,
            slot_mapping=positions.clone(),
            cu_seqlens_q=torch.tensor([0, len(positions)], dtype=torch.int32),
            kv_lens=torch.tensor([start + len(positions)], dtype=torch.int32),
            block_tables=table,
            segments=None,
            logits_rows=torch.arange(len(positions)),
        )
        rows.append(decoder.logits(decoder.forward(inputs, cache)).log_softmax(-1))
    return torch.cat(rows)


def main(
    text: Annotated[Path, typer.Option(help="What is scored.")] = REPOSITORY / "tests" / "model" / "prose.txt",
    model: Annotated[str, typer.Option(help="As of lorry serve.")] = DEFAULT_MODEL,
) -> None:
    """Print error of the log-probabilities, Kullback-Leibler divergence and agreement of the likeliest token."""
    folder = resolve_model(model)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    table = Table("products", "max error", "RMS error", "KL, mean", "KL, max", "same token", title=f"{len(ids)} tokens")
    reference: Tensor | None = None
    with torch.inference_mode():
        for name, dtype, products, kv_dtype in CHOICES:
            actual = log_probabilities(load_model(str(folder), dtype=dtype, products=products), ids, kv_dtype)
            reference = actual if reference is None else reference
            error = actual - reference
            divergence = (reference.exp() * -error).sum(-1).abs()
            table.add_row(
                name,
                f"{error.abs().max():.1e}",
                f"{error.square().mean().sqrt():.1e}",
                f"{divergence.mean():.1e}",
                f"{divergence.max():.1e}",
                f"{(actual.argmax(-1) == reference.argmax(-1)).float().mean():.4f}",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
