"""What each choice of number types does to the default model's log-probabilities, teacher-forced; and to those of its
example adapters the types of rank pages.

    python bench/fidelity.py [--text FILE] [--model NAME]

The first row, float32 products over a float32 cache, is the reference of all others: transformers computes the same
(tests/model/test_smollm2.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from lorry.adapters.device.pool import PagePool
from lorry.adapters.layout import PAGE_DTYPES
from lorry.adapters.loader import load_adapter
from lorry.adapters.reading.files import Place
from lorry.adapters.segments import build_segments
from lorry.kernels.lora import AdapterPages
from lorry.kernels.nf4_linear import Products
from lorry.server.cache.blocks import blocks_for
from lorry.server.cache.kv_cache import KVCache
from lorry.server.model.base_weights import DecoderWeights
from lorry.server.model.decoder import Decoder
from lorry.server.model.inputs import ModelInputs
from lorry.server.model.load import load_model
from lorry.server.model.store import DEFAULT_MODEL, resolve_model

REPOSITORY = Path(__file__).resolve().parents[1]
ADAPTERS = REPOSITORY / "examples" / "adapters"
CHUNK = 256
PAGES = ("float32", "bfloat16", "int8", "fp8")
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


def log_probabilities(
    decoder: Decoder, ids: list[int], kv_dtype: torch.dtype, pages: AdapterPages | None = None
) -> Tensor:
    """float32 [len(ids), V] of one sequence, prefilled in chunks; pages: with one adapter, in slot 0."""
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
            segments=None if pages is None else build_segments([(len(positions), ((0, 1.0),))]),
            logits_rows=torch.arange(len(positions)),
        )
        rows.append(decoder.logits(decoder.forward(inputs, cache, pages)).log_softmax(-1))
    return torch.cat(rows)


def main(
    text: Annotated[Path, typer.Option(help="What is scored.")] = REPOSITORY / "tests" / "model" / "prose.txt",
    model: Annotated[str, typer.Option(help="As of lorry serve.")] = DEFAULT_MODEL,
) -> None:
    """Print error of the log-probabilities, Kullback-Leibler divergence and agreement of the likeliest token."""
    folder = resolve_model(model)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    with torch.inference_mode():
        rows = (
            (name, log_probabilities(load_model(str(folder), dtype=dtype, products=products), ids, kv_dtype))
            for name, dtype, products, kv_dtype in CHOICES
        )
        Console().print(compared(f"{len(ids)} tokens", rows))
        for adapter in sorted(ADAPTERS.iterdir()):
            Console().print(compared(f"{len(ids)} tokens, {adapter.name}", with_pages(folder, adapter, ids)))


def with_pages(folder: Path, adapter: Path, ids: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The log-probabilities of an adapter, by the type of its pages."""
    decoder = load_model(str(folder))
    for name in PAGES:
        pool = PagePool(decoder.layout, 64 << 20, PAGE_DTYPES[name], max_slots=1)
        place = Place(adapter, (adapter.parent,))
        pool.insert(load_adapter(place, decoder.layout, pool.dtype, DecoderWeights(decoder)))
        yield f"pages {name}", log_probabilities(decoder, ids, torch.float32, pool.pages)


def compared(title: str, rows: Iterable[tuple[str, Tensor]]) -> Table:
    """Of log-probabilities, each against the first."""
    table = Table("types", "max error", "RMS error", "KL, mean", "KL, max", "same token", title=title)
    reference: Tensor | None = None
    for name, actual in rows:
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
    return table


if __name__ == "__main__":
    typer.run(main)
