"""Which layers a bucket means; what is not a layer is refused."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from lorry.server.engine.messages import Generate, ModelInfo
from lorry.server.errors import InvalidField
from lorry.server.frontend.prepare import generate_command
from lorry.server.frontend.request import Request, TokenPrompt
from lorry.server.params import DoLa, SamplingParams

MODEL = ModelInfo(
    *("m", "M", 1, 3, 5, 400, 200, (1,), "float32", "float32", "float32", "cpu", 4.1, 7, 11, 16, 13, "reference")
)


def command(dola: DoLa, layers: int, tied: bool = False) -> Generate:
    request = Request(prompt=TokenPrompt((3, 4)), sampling=SamplingParams(dola=dola))
    model = msgspec.structs.replace(MODEL, layers=layers, tied_embeddings=tied)
    return generate_command(request, "wire", [3, 4], model)


@pytest.mark.parametrize(
    ("bucket", "layers", "tied", "wanted"),
    [
        ("low", 32, False, range(0, 16, 2)),
        ("low", 32, True, range(2, 16, 2)),
        ("high", 32, True, range(16, 32, 2)),
        ("high", 33, False, range(16, 33, 2)),
        ("low", 40, False, range(0, 20, 2)),
        ("low", 60, True, range(2, 20, 2)),
        ("high", 60, False, range(40, 60, 2)),
        ("low", 3, True, [2]),
        ("low", 2, True, [1]),
        ("low", 1, False, [0]),
        ("high", 1, True, [0]),
    ],
)
def test_buckets_are_those_of_transformers(
    bucket: Literal["low", "high"], layers: int, tied: bool, wanted: range | list[int]
) -> None:
    assert command(DoLa(bucket=bucket), layers, tied).sampling.dola == DoLa(tuple(wanted))


def test_layers_are_taken_as_they_are_where_they_are_before_the_last() -> None:
    assert command(DoLa((0, 31)), 32).sampling.dola == DoLa((0, 31))
    with pytest.raises(InvalidField, match="layer 32 is not one of 0 to 31") as refusal:
        command(DoLa((0, 32)), 32)
    assert refusal.value.fields["field"] == "dola.layers"
