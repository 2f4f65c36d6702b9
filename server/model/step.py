"""What is the same in all layers of a step, and how a layer's products meet the step's adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from lorry.kernels import dispatch
from lorry.kernels.lora import (
    HEAD,
    AdapterPages,
    LoraTerm,
    Routes,
    Segments,
    Site,
    fill_routes,
    lora_add,
    lora_embed,
    make_routes,
)
from lorry.server.model.inputs import ModelInputs
from lorry.server.model.projection import Projection


class KeyValueCache(Protocol):
    """Paged keys and values per layer, each [num_blocks, kv_heads, block_size, head_dim]."""

    @property
    def keys(self) -> list[Tensor]: ...

    @property
    def values(self) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of one step. routes: on a GPU, where each row finds its pages, filled."""

    pages: AdapterPages
    segments: Segments
    routes: Routes | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What is the same in all layers of a step. tapped: what `tap` has kept."""

    inputs: ModelInputs
    kv: KeyValueCache
    adapters: StepAdapters | None
    tapped: list[Tensor] = field(default_factory=list)

    def tap(self, layer: int, stream: Tensor) -> None:
        """Keep of the stream [T, H] before a layer the rows that are wanted, [P, H]."""
        if layer in self.inputs.taps:
            assert self.inputs.tap_rows is not None
            self.tapped.append(stream.index_select(0, self.inputs.tap_rows))

    def project(
        self, projection: Projection, x: Tensor, layer: int, sites: tuple[Site, ...]
    ) -> tuple[Tensor, LoraTerm | None]:
        """x Wᵀ, and the LoRA term that whoever reads it next has still to add: on a GPU its first half is done here, on
        a CPU it is added here."""
        adapters = self.adapters
        if adapters is None:
            return projection.project(x), None
        if adapters.routes is None:
            y = projection.project(x)
            lora_add(y, x, adapters.pages, layer, sites, adapters.segments)
            return y, None
        term = LoraTerm(adapters.routes, adapters.pages, layer, sites, x.shape[1])
        return projection.project(x, term), term


def adapters_of(
    inputs: ModelInputs, pages: AdapterPages | None, widths: Sequence[tuple[int, int]]
) -> StepAdapters | None:
    """What a step's products need of its adapters; on a GPU its rows' pages are looked up. widths: of `make_routes`."""
    segments, rows = inputs.segments, inputs.token_ids.shape[0]
    if segments is None:
        return None
    assert pages is not None, "segments without pages"
    return StepAdapters(pages, segments, _routes(segments, rows, pages, widths))


def add_to_embeddings(hidden: Tensor, inputs: ModelInputs, pages: AdapterPages | None, vocab_size: int) -> None:
    """hidden [T, H], the base's embeddings, += what the step's adapters do to them, where any does."""
    if inputs.logits_segments is None:
        return
    assert inputs.segments is not None
    ends = _ends_of(pages)
    segments = replace(inputs.segments, page_bound=inputs.logits_segments.page_bound)
    routes = _routes(segments, hidden.shape[0], ends, [(1, 1)])
    lora_embed(hidden, inputs.token_ids, vocab_size, ends, segments, routes)


def add_to_logits(logits: Tensor, hidden: Tensor, segments: Segments | None, pages: AdapterPages | None) -> None:
    """logits float32 [R, V], the base's, of hidden [R, H] += what adapters do to them; segments: of these rows."""
    if segments is None or hidden.shape[0] == 0:
        return
    ends = _ends_of(pages)
    routes = _routes(segments, hidden.shape[0], ends, [(hidden.shape[1], 1)])
    lora_add(logits, hidden, ends, 0, (Site(HEAD, 0, logits.shape[1]),), segments, routes)


def _ends_of(pages: AdapterPages | None) -> AdapterPages:
    assert pages is not None and pages.ends is not None, "segments without pages"
    return pages.ends


def _routes(segments: Segments, rows: int, pages: AdapterPages, widths: Sequence[tuple[int, int]]) -> Routes | None:
    """On a GPU, where `rows` rows find their pages; None on a CPU."""
    if not dispatch.on_gpu(pages.arena):
        return None
    count, adapters = segments.slots.shape
    routes = make_routes(rows, count, segments.page_bound or adapters * pages.offsets.shape[3], pages, widths)
    fill_routes(routes, segments, pages, rows)
    return routes
