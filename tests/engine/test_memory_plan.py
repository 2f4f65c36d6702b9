"""Sizes on a GPU that need not be there: blocks, refusals by name, the line at start."""

from __future__ import annotations

from typing import Any

import pytest

from lorry.server.config import GIB, MIB
from lorry.server.engine.start.memory_plan import GRAPH, SPARE, Taken, graph_memory, kv_blocks, memory_line, size
from lorry.server.errors import InvalidField

TAKEN = Taken(total=80 * GIB, others=GIB, weights=5 * GIB, adapters=2 * GIB, activations=3 * GIB, graphs=GIB)


def blocks(taken: Taken = TAKEN, block: int = 2 * MIB, **changes: Any) -> int:
    settings: dict[str, Any] = {
        "gpu_memory_fraction": 0.9,
        "kv_memory": None,
        "max_running": 64,
        "context_length": 131072,
    }
    return kv_blocks(taken, block, **settings | changes)


def test_what_is_left_of_the_share_is_for_the_cache() -> None:
    assert blocks() == (72 - 11) * 512
    assert blocks(gpu_memory_fraction=0.5) == (40 - 11) * 512


def test_a_share_that_others_hold_cannot_be_taken() -> None:
    held = Taken(total=80 * GIB, others=40 * GIB, weights=5 * GIB, adapters=2 * GIB)
    assert blocks(held) == (80 - 40 - 7) * 512 - SPARE // (2 * MIB)
    assert blocks(gpu_memory_fraction=1.0) == (80 - 1 - 11) * 512 - SPARE // (2 * MIB)


def test_no_more_than_all_sequences_can_use() -> None:
    assert blocks(max_running=3, context_length=33) == 9
    assert blocks(max_running=3, context_length=33, kv_memory=20 * GIB) == 9


def test_a_given_size_is_taken_whatever_the_fraction() -> None:
    assert blocks(kv_memory=20 * GIB, gpu_memory_fraction=0.1) == 20 * 512
    assert blocks(kv_memory=20 * GIB + 2 * MIB - 1) == 20 * 512


def test_one_block_is_enough_and_less_is_refused() -> None:
    exact = Taken(total=80 * GIB, others=0, weights=70 * GIB, adapters=2 * GIB - 2 * MIB)
    assert blocks(exact) == 1
    with pytest.raises(InvalidField) as refused:
        blocks(Taken(total=80 * GIB, others=0, weights=70 * GIB, adapters=2 * GIB - 2 * MIB + 1))
    assert refused.value.fields["field"] == "gpu_memory_fraction"


def test_a_small_fraction_is_refused_with_all_sizes() -> None:
    with pytest.raises(InvalidField) as refused:
        blocks(gpu_memory_fraction=0.1)
    assert refused.value.message == (
        "gpu_memory_fraction 0.10 of 80.0 GiB leaves -3.0 GiB for the key and value cache (a block takes 2.0 MiB) "
        "after 5.0 GiB of weights, 2.0 GiB of adapters, 3.0 GiB of activations and 1.0 GiB of graphs; "
        "raise it or lower adapter_memory or token_budget"
    )


def test_others_are_named_where_they_are_the_cause() -> None:
    with pytest.raises(InvalidField) as refused:
        blocks(Taken(total=80 * GIB, others=75 * GIB, weights=5 * GIB, adapters=2 * GIB))
    assert refused.value.message.startswith("75.0 GiB of the GPU's 80.0 GiB are in use by others")
    assert "raise it" not in refused.value.message


@pytest.mark.parametrize(("kv_memory", "words"), [(70 * GIB, "lower it"), (2 * MIB - 1, "raise it")])
def test_a_given_size_that_cannot_be_is_refused(kv_memory: int, words: str) -> None:
    with pytest.raises(InvalidField, match=words) as refused:
        blocks(kv_memory=kv_memory)
    assert refused.value.fields["field"] == "kv_memory"


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_what_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(InvalidField, match="gpu_memory_fraction"):
        blocks(gpu_memory_fraction=fraction)


def test_graphs_share_their_steps_memory() -> None:
    assert graph_memory(100 * MIB, 20) == 100 * MIB + 20 * GRAPH
    assert graph_memory(100 * MIB, 0) == 0


def test_the_line_says_who_got_how_much() -> None:
    assert memory_line(
        weights=int(4.3 * GIB),
        adapters=2 * GIB,
        pages=12345,
        activations=int(1.2 * GIB),
        graphs=int(0.4 * GIB),
        kv=int(60.1 * GIB),
        blocks=12345,
        free=8 * GIB,
    ) == (
        "memory: weights 4.3 GiB · adapters 2.0 GiB (12,345 pages) · activations 1.2 GiB · graphs 410 MiB · "
        "KV 60.1 GiB (12,345 blocks, 197,520 tokens) · free 8.0 GiB"
    )
    line = memory_line(weights=82 * MIB, adapters=MIB // 2, pages=7, kv=GIB, blocks=10, free=900)
    assert (
        line == "memory: weights 82 MiB · adapters 0.5 MiB (7 pages) · KV 1.0 GiB (10 blocks, 160 tokens) · "
        "free 900 bytes"
    )


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, MIB // 10, MIB, 10 * MIB, GIB - MIB, GIB, -3 * GIB)] == [
        "0 bytes",
        "104857 bytes",
        "1.0 MiB",
        "10 MiB",
        "1023 MiB",
        "1.0 GiB",
        "-3.0 GiB",
    ]
