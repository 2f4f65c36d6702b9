"""Launches of nf4_linear with the tiles that Llama-3-8B's shapes take; see assembly.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorry.kernels.lora import SITES, AdapterPages, LoraTerm, Site, make_routes
from lorry.kernels.nf4 import NF4Weight
from lorry.kernels.triton.nf4_fragments import Fragments
from lorry.kernels.triton.nf4_linear import dequantize, nf4_linear


def empty(rows: int, columns: int) -> NF4Weight:
    blocks = rows * columns // 64
    return NF4Weight(
        torch.empty(rows * columns // 2, dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8),
        (rows, columns),
        nested_absmax=torch.empty(-(-blocks // 256)),
        nested_code=torch.empty(256),
        nested_offset=0.0,
    )


def case(sizes: list[int], columns: int, rows: int, lane_columns: int) -> Callable[[], object]:
    def launch() -> object:
        fragments = Fragments([empty(size, columns) for size in sizes], None, lane_columns=lane_columns)
        return nf4_linear(torch.empty(rows, columns, dtype=torch.bfloat16), fragments)

    return launch


def with_shrink(rows: int, lane_columns: int) -> Callable[[], object]:
    """q, k and v with a page of an adapter for each."""
    columns, sizes = 1024, [512, 128, 128]

    def launch() -> object:
        layers = (4, 32, len(SITES))
        pages = AdapterPages(
            torch.empty(1 << 20, dtype=torch.bfloat16), torch.empty(*layers, 2, dtype=torch.int64), torch.empty(layers)
        )
        routes = make_routes(rows, 4, 2, pages, [(columns, 3)])
        sites = tuple(Site(index, sum(sizes[:index]), size) for index, size in enumerate(sizes))
        fragments = Fragments([empty(size, columns) for size in sizes], None, lane_columns=lane_columns)
        x = torch.empty(rows, columns, dtype=torch.bfloat16)
        return nf4_linear(x, fragments, shrink=LoraTerm(routes, pages, 0, sites, columns))

    return launch


def dequantized() -> object:
    return dequantize(Fragments([empty(256, 1024)], None), torch.bfloat16)


GATE_UP, DOWN = ([14336, 14336], 128), ([128], 14336)  # few columns or rows: the tiles are the same, the memory is not
CASES: dict[str, Callable[[], object]] = {
    "dequantize": dequantized,
    **{f"shrink M={rows} lanes={lanes}": with_shrink(rows, lanes) for lanes in (2, 4) for rows in (16, 64)},
    **{
        f"{name} M={rows} lanes={lanes}": case(sizes, columns, rows, lanes)
        for lanes in (2, 4)
        for name, (sizes, columns), rows in (
            ("gate_up", GATE_UP, 16),
            ("down", DOWN, 16),
            ("gate_up", GATE_UP, 64),
            ("gate_up", GATE_UP, 512),
        )
    },
}
ONLY_FOR = {name: (90,) if name.endswith("lanes=2") else (80,) for name in CASES if "lanes" in name}
