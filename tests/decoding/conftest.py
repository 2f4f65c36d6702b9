"""Rows as the engine would make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from lorry.server.decoding.interface import Row
from lorry.server.params import SamplingParams, StoppingParams

RowMaker = Callable[..., Row]


@pytest.fixture(scope="session")
def make_row() -> RowMaker:
    """Row of a sequence: `prompt`, `output`, `stopping`, `eos`, … and every field of SamplingParams by keyword."""

    def make(
        key: int = 0,
        prompt: Sequence[int] = (1, 2, 3),
        output: Sequence[int] = (),
        index: int = 0,
        logprobs: int | None = None,
        eos: tuple[int, ...] = (),
        stopping: StoppingParams | None = None,
        **sampling: object,
    ) -> Row:
        return Row(
            key=key,
            group=key,
            index=index,
            prompt_token_ids=prompt,
            output_token_ids=output,
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
            stopping=stopping or StoppingParams(max_new_tokens=99),
            eos_token_ids=eos,
            logprobs=logprobs,
        )

    return make
