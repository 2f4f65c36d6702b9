"""Sampling on a GPU against the reference in float64 and against the CPU's strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorry.kernels.philox import uniforms as cpu_uniforms
from lorry.kernels.sampling import (
    SORTED,
    Draws,
    SamplingRows,
    TokenValues,
    kept_tokens,
    penalize_reference,
    sample_reference,
    uniforms,
    weights,
)
from lorry.kernels.triton import penalties
from lorry.kernels.triton import sampling as gpu
from lorry.server.decoding.interface import Row
from lorry.server.decoding.processors import LogitBias, Penalties
from lorry.server.decoding.sampling import choose
from lorry.server.params import SamplingParams, StoppingParams

VOCABULARY = 1009
ALMOST_ONE = 1 - 2.0**-53
CUTS: dict[str, dict[str, float]] = {  # temperature, top_k, top_p, min_p
    "plain": {},
    "greedy": {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
    "tiny temperature": {"temperature": 1e-45},
    "hot": {"temperature": 1e6},
    "top-k 1": {"top_k": 1},
    "top-k": {"top_k": 23, "temperature": 0.7},
    "top-k V": {"top_k": VOCABULARY},
    "top-k past V": {"top_k": 2**31 - 1, "top_p": 0.9},
    "top-p 0": {"top_p": 0.0},
    "top-p tiny": {"top_p": 1e-12},
    "top-p": {"top_p": 0.9},
    "top-p of nearly all": {"top_p": 0.999999},
    "min-p": {"min_p": 0.01, "temperature": 1.3},
    "min-p 1": {"min_p": 1.0},
    "all three": {"top_k": 200, "top_p": 0.8, "min_p": 0.02, "temperature": 1.9},
}
LIST = {"tile": 256, "listed": 16, "chunk": 1024}  # the short list; the whole row in one chunk
CHUNKS = {"tile": 512, "listed": 2, "chunk": 512}  # nearly all rows by chunks


def rows_of(cuts: list[dict[str, float]], device: str) -> SamplingRows:
    def column(name: str, off: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([cut.get(name, off) for cut in cuts], dtype=torch.float64).to(dtype).to(device)

    return SamplingRows(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int32),
        column("top_p", 1.0, torch.float64),
        column("min_p", 0.0, torch.float64),
    )


def logits_of(kind: str, count: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Rows of a wider matrix: their stride is not the vocabulary."""
    z = torch.randn(count, vocabulary + 3, generator=torch.Generator().manual_seed(vocabulary)) * 2.5
    if kind == "ties":
        z = z.round() + 0.0 * z
        z[:, ::7] = -0.0
    elif kind == "masked":
        z[:, 5:800] = -torch.inf
        z[:, 300] = 1.0
    elif kind == "flat":
        z[:] = 3.0
    return z.to(dtype)[:, :vocabulary]


def expect_drawn(z: Tensor, cut: dict[str, float], u: float, token: int) -> None:
    """The token's share of the unit interval holds u, to 1e-6."""
    settings = SamplingParams(**cut)  # type: ignore[arg-type]
    if settings.temperature == 0:
        assert token == int(z.float().argmax())
        return
    temperature = float(np.float32(settings.temperature))
    kept, falling = kept_tokens(z.float(), temperature, settings.top_k, settings.top_p, settings.min_p)
    if falling:
        kept = kept[torch.argsort(z[kept].float(), descending=True, stable=True)]
    share = weights(z.float(), temperature)[kept]
    ends = share.cumsum(0) / share.sum()
    place = (kept == token).nonzero()
    assert len(place) == 1, f"token {token} was not left"
    end = float(ends[place[0, 0]])
    assert end - float(share[place[0, 0]] / share.sum()) - 1e-6 <= u <= end + 1e-6
    assert share[place[0, 0]] > 0 or temperature < 1e-6


@pytest.mark.parametrize(
    ("kind", "dtype", "form"),
    [
        ("normal", torch.float32, LIST),
        ("ties", torch.float32, CHUNKS),
        ("masked", torch.bfloat16, CHUNKS),
        ("flat", torch.bfloat16, LIST),
    ],
)
def test_every_cut_at_its_edges(device: str, kind: str, dtype: torch.dtype, form: dict[str, int]) -> None:
    numbers = [0.0, ALMOST_ONE, 0.37, 0.61]
    cuts = list(CUTS.values())
    z = logits_of(kind, len(cuts), VOCABULARY, dtype)
    for shift in range(len(numbers) if device == "cuda" else 1):  # the interpreter takes its time
        uniform = torch.tensor([numbers[(place + shift) % 4] for place in range(len(cuts))], dtype=torch.float64)
        tokens, logprobs = gpu.sample(z.to(device), rows_of(cuts, device), uniform.to(device), **form)
        assert tokens.dtype is torch.int64 and logprobs.dtype is torch.float32
        for name, row, u, token in zip(CUTS, z, uniform.tolist(), tokens.tolist(), strict=True):
            try:
                expect_drawn(row, CUTS[name], u, token)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        wanted = torch.log_softmax(z.double(), 1).gather(1, tokens.cpu()[:, None])[:, 0]
        assert torch.allclose(logprobs.cpu().double(), wanted, rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize(
    ("cut", "few"),
    [({}, 33), ({"top_k": 40, "temperature": 0.8}, 5), ({"top_p": 0.95, "min_p": 0.001}, 3)],
    ids=["plain", "top-k", "top-p and min-p"],
)
def test_many_numbers_give_the_references_tokens(device: str, cut: dict[str, float], few: int) -> None:
    count = few if device == "cpu" else 2003
    z = logits_of("normal", 1, VOCABULARY, torch.float32).expand(count, -1)
    uniform = (torch.arange(count) + 0.5).double() / count
    rows = rows_of([cut] * count, device)
    tokens, _ = gpu.sample(z.to(device), rows, uniform.to(device), tile=256, listed=16)
    wanted, _ = sample_reference(z, rows_of([cut] * count, "cpu"), uniform)
    for place in (tokens.cpu() != wanted).nonzero()[:, 0].tolist():
        expect_drawn(z[0], cut, float(uniform[place]), int(tokens[place]))
    assert int((tokens.cpu() != wanted).sum()) <= count // 100


@pytest.mark.parametrize(
    "cut",
    [{"top_p": 0.9999, "temperature": 3.0}, {"top_k": 2100}, {"top_k": 2100, "top_p": 0.2}, {"top_k": 1500}, {}],
    ids=["long nucleus", "long top-k", "short nucleus of a long top-k", "falling", "plain"],
)
def test_flat_rows_of_a_long_vocabulary_draw_as_the_cpu_does(device: str, cut: dict[str, float]) -> None:
    """What is kept passes 2048 tokens or stops before: by ids or by falling z, as `server.decoding` draws."""
    vocabulary = 3001
    assert vocabulary > SORTED
    z = logits_of("normal", 3, vocabulary, torch.bfloat16)
    seeds = torch.tensor([-7, 11, 2**62])
    draws = Draws(*(t.to(device) for t in (seeds, torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1]))))
    tokens, _ = gpu.sample(z.to(device), rows_of([cut] * 3, device), draws, listed=8, chunk=2048)
    rows = [
        row(seed % 2**64, index, range(position), cut)
        for seed, index, position in zip(seeds.tolist(), (0, 3, 1), (2, 0, 1), strict=True)
    ]
    assert tokens.tolist() == choose(rows, z.float().contiguous())


def row(seed: int, index: int, output: Any, cut: dict[str, Any], prompt: Any = ()) -> Row:
    return Row(
        key=index,
        group=0,
        index=index,
        prompt_token_ids=prompt,
        output_token_ids=output,
        sampling=SamplingParams(seed=seed, **cut),
        stopping=StoppingParams(max_new_tokens=9),
    )


def test_the_reference_chooses_what_the_cpu_chooses() -> None:
    cuts = [cut for cut in CUTS.values() if cut.get("top_p") != 0.0 and cut.get("temperature", 1.0) < 1e3]
    cuts = [{**cut, "top_k": 700} if cut.get("top_k", 0) > VOCABULARY else cut for cut in cuts]
    for vocabulary in (VOCABULARY, 8209):
        z = logits_of("normal", len(cuts), vocabulary, torch.float32).contiguous()
        for seed in range(12):
            index = torch.arange(len(cuts))
            draws = Draws(torch.full_like(index, seed), index, torch.full_like(index, 2))
            tokens, _ = sample_reference(z, rows_of(cuts, "cpu"), uniforms(draws))
            rows = [row(seed, i, [1, 2], cut) for i, cut in enumerate(cuts)]
            assert tokens.tolist() == choose(rows, z)


def test_uniforms_are_those_of_the_cpu(device: str) -> None:
    seeds, indices, positions = [0, 5, 2**64 - 1, 2**63 + 12345], [0, 1, 2**31 - 1, 7], [0, 2**32 + 9, 41, 3]
    signed = [seed - 2**64 if seed >= 2**63 else seed for seed in seeds]
    draws = Draws(torch.tensor(signed), torch.tensor(indices), torch.tensor(positions))
    wanted = torch.from_numpy(cpu_uniforms(seeds, indices, positions))
    assert torch.equal(uniforms(draws), wanted)
    z = torch.zeros(4, VOCABULARY, device=device)  # every token the same share: the token shows the number
    on_device = Draws(*(t.to(device) for t in (draws.seeds, draws.indices, draws.positions)))
    tokens, _ = gpu.sample(z, rows_of([{}] * 4, device), on_device, tile=256)
    assert tokens.tolist() == (wanted * VOCABULARY).long().tolist()


def test_a_row_does_not_depend_on_its_batch_and_repeats_itself(device: str) -> None:
    cuts = [CUTS[name] for name in ("all three", "plain", "greedy", "top-p", "min-p")]
    z = logits_of("ties", 5, VOCABULARY, torch.bfloat16).to(device)
    rows, index = rows_of(cuts, device), torch.arange(5, device=device)
    draws = Draws(index * 77 + 1, index, index + 4)
    together = gpu.sample(z, rows, draws, **LIST)
    again = gpu.sample(z, rows, draws, **LIST)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    order = torch.tensor([3, 0, 4], device=device)
    picked = SamplingRows(rows.temperature[order], rows.top_k[order], rows.top_p[order], rows.min_p[order])
    some = gpu.sample(z[order], picked, Draws(draws.seeds[order], index[order], draws.positions[order]), **LIST)
    assert all(torch.equal(a, b[order]) for a, b in zip(some, together, strict=True))


def test_log_probabilities_of_other_logits(device: str) -> None:
    z = logits_of("normal", 3, VOCABULARY, torch.float32).to(device)
    raw = logits_of("ties", 3, VOCABULARY, torch.float32).to(device)
    cuts = [{"top_k": 9}, {}, {"temperature": 0.0}]
    uniform = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, device=device)
    tokens, logprobs = gpu.sample(z, rows_of(cuts, device), uniform, raw, tile=256)
    wanted, report = sample_reference(z.cpu(), rows_of(cuts, "cpu"), uniform.cpu(), raw.cpu())
    assert torch.equal(tokens.cpu(), wanted)
    assert torch.allclose(logprobs.cpu(), report, rtol=3e-7, atol=2e-6)


def test_no_rows_and_a_vocabulary_of_one(device: str) -> None:
    empty = gpu.sample(torch.empty(0, 17, device=device), rows_of([], device), torch.empty(0, dtype=torch.float64))
    assert [len(part) for part in empty] == [0, 0]
    uniform = torch.full((2,), 0.4, dtype=torch.float64, device=device)
    z = torch.full((2, 1), -3.0, device=device)
    tokens, logprobs = gpu.sample(z, rows_of([{"top_p": 0.3}, {}], device), uniform, tile=64)
    assert tokens.tolist() == [0, 0] and logprobs.tolist() == [0, 0]


def penalty_lists(device: str) -> tuple[TokenValues, TokenValues, list[Tensor]]:
    """Ragged: a row with both lists, one without any, one with penalties in two rounds, one with a bias only."""
    generator = torch.Generator().manual_seed(3)
    counts = [torch.randperm(3001, generator=generator)[:n].int() for n in (37, 0, 1301, 0)]
    biased = [counts[0][:5], counts[1], counts[2][:0], torch.tensor([0, 3000], dtype=torch.int32)]

    def values(ids: list[Tensor], numbers: Callable[[int], Tensor]) -> TokenValues:
        starts = torch.tensor([0, *np.cumsum([len(part) for part in ids])], dtype=torch.int32)
        spare = torch.zeros(7, dtype=torch.int32)  # capacity that no row owns
        flat = torch.cat([*ids, spare])
        return TokenValues(starts.to(device), flat.to(device), numbers(len(flat)).to(device))

    tables = [[1.3, 1.0, 0.7, 1.0], [0.5, 0.0, -0.25, 2.0], [0.1, 0.0, 1.7, 2.0]]
    return (
        values(biased, lambda n: torch.randn(n, generator=generator)),
        values(counts, lambda n: torch.randint(0, 4, (n,), generator=generator).float()),
        [torch.tensor(table, device=device) for table in tables],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["both", "bias", "counts", "listed last", "new last"])
def test_penalties_have_the_references_bits(device: str, dtype: torch.dtype, which: str) -> None:
    bias, counts, parameters = penalty_lists(device)
    lists = (bias if which != "counts" else None, counts if which != "bias" else None)
    if which.endswith("last"):
        new = [t for t in range(3001) if t not in counts.token_ids[-1345:].tolist()][7]
        last = int(counts.token_ids[37 + 1300]) if which == "listed last" else new
        parameters = [*parameters, torch.tensor([-1, -1, last, 2], device=device)]
    logits = logits_of("normal", 4, 3001, dtype).to(device)
    logits[0, counts.token_ids[3].long()] = -torch.inf
    wanted = logits.clone()
    penalize_reference(wanted, *lists, *parameters)
    penalties.penalize(logits, *lists, *parameters)
    if device == "cpu" and dtype is torch.bfloat16:  # the interpreter cuts off the bits that a GPU rounds
        assert torch.allclose(logits.float(), wanted.float(), rtol=2.0**-7, atol=2.0**-4)
        return
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize("last", [9, 700, 33])
def test_a_last_token_counts_as_if_it_stood_in_the_list(device: str, last: int) -> None:
    z = logits_of("normal", 2, VOCABULARY, torch.float32).contiguous().to(device)
    parameters = [torch.tensor([value, value], device=device) for value in (1.7, 0.3, 0.7)]

    def penalized(counts: dict[int, float], *news: int) -> Tensor:
        ids, numbers = torch.tensor([*counts], dtype=torch.int32), torch.tensor([*counts.values()])
        starts = torch.tensor([0, len(counts), len(counts)], dtype=torch.int32)  # the second row's list is empty
        lists = TokenValues(starts.to(device), ids.to(device), numbers.to(device))
        new = torch.tensor(news, device=device) if news else None
        penalties.penalize(found := z.clone(), None, lists, *parameters, new)
        return found

    counts = {5: 0.0, 9: 2.0, 700: 0.0}
    wanted = penalized({**counts, last: counts.get(last, 0.0) + 1})
    assert torch.equal(penalized(counts, last, -1), wanted)
    assert torch.equal(penalized(counts, -1, -1), penalized(counts))
    assert not torch.equal(wanted, penalized(counts))
    assert (penalized(counts, -1, last)[1] != z[1]).nonzero().tolist() == [[last]]


def test_penalties_have_the_bits_of_the_cpus_processors(device: str) -> None:
    z = logits_of("normal", 1, VOCABULARY, torch.float32).contiguous()
    prompt, output, bias = [5, 9, 9, 700], [9, 4, 4, 4, 1008], {4: 1.7, 12: -30.0, 1008: 0.3}
    cut = {"repetition_penalty": 1.7, "presence_penalty": 0.3, "frequency_penalty": 0.7, "logit_bias": bias}
    one, wanted = row(1, 0, output, cut, prompt), z.clone()
    LogitBias().apply([one], [0], wanted)
    Penalties().apply([one], [0], wanted)
    held = list(dict.fromkeys(prompt + output))

    def values(entries: dict[int, float]) -> TokenValues:
        ids, numbers = torch.tensor(list(entries), dtype=torch.int32), torch.tensor([*entries.values()])
        starts = torch.tensor([0, len(entries)], dtype=torch.int32)
        return TokenValues(starts.to(device), ids.to(device), numbers.to(device))

    found = z.to(device)
    counts = values({token: float(output.count(token)) for token in held})
    numbers = [torch.tensor([value], device=device) for value in (1.7, 0.3, 0.7)]
    penalties.penalize(found, values(bias), counts, *numbers)
    assert torch.equal(found.cpu(), wanted)


def test_rows_without_a_finite_number_stay_inside_and_harm_nobody(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, form = 401, {"tile": 128, "listed": 2, "chunk": 256}
    cuts = [CUTS[name] for name in ("plain", "greedy", "all three")]
    healthy = logits_of("normal", len(cuts), vocabulary, torch.float32).to(device)
    broken = healthy.new_full((4, vocabulary), torch.nan)
    broken[1, 3] = 1.0
    broken[3].view(torch.int32)[128:] = 0x7FFFFFFF  # blocks beyond every bound, by whichever way NaN are compared
    broken[2] = torch.inf
    forbidden = torch.full_like(healthy, -torch.inf)
    z = torch.cat((healthy, forbidden, *(row.expand(len(cuts), -1) for row in broken)))
    uniform = torch.linspace(0.05, 0.95, len(z), dtype=torch.float64, device=device)
    guards, empty = [], torch.empty

    def guarded(*shape: int, **kind: Any) -> Tensor:
        made = empty(shape[0] + 40, *shape[1:], **kind).fill_(77)
        guards.append(made[shape[0] :])
        return made[: shape[0]]

    monkeypatch.setattr(torch, "empty", guarded)
    tokens, _ = gpu.sample(z, rows_of(cuts * 6, device), uniform, **form)
    monkeypatch.undo()
    assert all(bool((guard == 77).all()) for guard in guards)
    assert tokens.min() >= 0 and tokens.max() < vocabulary
    assert tokens[len(cuts) :][: len(cuts)].tolist() == [0] * len(cuts)
    alone, _ = gpu.sample(healthy, rows_of(cuts, device), uniform[: len(cuts)], **form)
    assert torch.equal(tokens[: len(cuts)], alone)
    reference, _ = sample_reference(z.cpu(), rows_of(cuts * 6, "cpu"), uniform.cpu())
    assert reference.min() >= 0 and reference.max() < vocabulary
    assert reference[len(cuts) :][: len(cuts)].tolist() == [0] * len(cuts)


def test_parameters_of_another_type_are_refused(device: str) -> None:
    from lorry.kernels.sampling import sample

    z, rows = torch.zeros(2, 9, device=device), rows_of([{}, {}], device)
    uniform = torch.zeros(2, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="top_p must be"):
        sample(z, replace(rows, top_p=rows.top_p.float()), uniform)
    with pytest.raises(ValueError, match="logits must be"):
        sample(z.half(), rows, uniform)
    assert sample(z, rows, uniform)[0].tolist() == [0, 0]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_assembly(assembled: Callable[[str, int], list[Any]], architecture: int, dtype: str) -> None:
    tiles, draw = assembled(f"sample {dtype}", architecture)
    assert tiles.spills == draw.spills == 0
    width = 4 if dtype == "float32" else 8
    assert tiles.count("LDG.E.128") == gpu.TILE // 128 // width  # all of the logits in 16-byte loads
    assert tiles.count("LDG.E.128") + 4 == tiles.count("LDG")  # and the row's four parameters
    assert draw.count("LDG.E.128") >= 3 * gpu.TILE // 256 // width
    assert assembled("penalize", architecture)[0].spills == 0
