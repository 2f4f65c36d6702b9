"""Which layers DoLa contrasts: a part of a model's becomes their numbers."""

from __future__ import annotations

from lorry.server.engine.messages import ModelInfo
from lorry.server.errors import InvalidField
from lorry.server.params import DoLa

DEEP, SPAN = 40, 20  # more layers than DEEP: a bucket has SPAN of them


def with_layers(dola: DoLa, model: ModelInfo) -> DoLa:
    """With the numbers of its candidates; raises InvalidField for a layer that is not before the last.

    Every other layer of the lower or the upper half, as in transformers; where the embedding is the head as well, not
    those before 2, which tell little but the last token.
    """
    count = model.layers
    if dola.bucket is None:
        if dola.layers[-1] >= count:
            raise InvalidField(
                f"layer {dola.layers[-1]} is not one of 0 to {count - 1}, those before the model's last",
                field="dola.layers",
            )
        return dola
    if dola.bucket == "high":
        return DoLa(tuple(range(count - SPAN if count > DEEP else count // 2, count, 2)))
    first = 2 if model.tied_embeddings else 0
    layers = range(first, SPAN if count > DEEP else count // 2, 2)
    return DoLa(tuple(layers) or (min(first, count - 1),))
