"""One step's tensors as the decoder reads them; the engine builds them, the model never changes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorry.kernels.lora import Segments


@dataclass(frozen=True)
class ModelInputs:
    """A flat batch of T tokens of S sequences, sequences one behind the other.

    Sequence s owns tokens `cu_seqlens_q[s] : cu_seqlens_q[s+1]`, the last of its `kv_lens[s]` tokens so far
    (the keys of this step included). R rows are wanted as logits.
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], 0 for a sequence's first token
    slot_mapping: Tensor  # int64 [T], block * block_size + offset; -1: not stored
    cu_seqlens_q: Tensor  # int32 [S + 1]
    kv_lens: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, max_blocks]
    segments: Segments | None  # None: no token of the batch has an adapter
    logits_rows: Tensor  # int64 [R], indices into T
    max_query_len: int | None = None  # most tokens of a sequence in this step, where known: kernels are chosen by it
    logits_segments: Segments | None = None  # of the R rows; None: no adapter changes embedding or head in this step
    taps: tuple[int, ...] = ()  # layers, rising, whose stream is wanted before they change it
    tap_rows: Tensor | None = None  # int64 [P], indices into T: of these tokens; None: of none
    tap_segments: Segments | None = None  # of the P rows, as `logits_segments`
    sources: Tensor | None = None  # int64 [T], row of the step before whose token this is; -1: it is known
