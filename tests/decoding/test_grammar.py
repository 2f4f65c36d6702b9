"""Masks from grammars: exactly the allowed tokens are left, for whatever rows stand beside, however the row came."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorry.server.decoding.forced import SkipForced
from lorry.server.decoding.grammar import Grammar, cut, cut_on_device
from lorry.server.decoding.interface import Row
from lorry.server.decoding.processors import Processors
from lorry.server.decoding.sampling import Sampling
from lorry.server.errors import InvalidField
from lorry.server.grammars.library import Library
from lorry.server.grammars.vocabulary import load_vocabulary
from lorry.server.params import StoppingParams, StructuredOutput

VOCAB, EOS = 49_152, 2
DATE = StructuredOutput("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
COLOURS = StructuredOutput("choice", '["red", "green", "blue"]')
POINT = StructuredOutput(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"first_coordinate": {"type": "integer"}, "second_coordinate": {"type": "integer"}},
            "required": ["first_coordinate", "second_coordinate"],
            "additionalProperties": False,
        }
    ),
)


@pytest.fixture(scope="module")
def library(smollm2_folder: Path) -> Library:
    return Library(load_vocabulary(smollm2_folder, VOCAB, (EOS,)))


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


def strategy(library: Library) -> SkipForced:
    processors, grammar = Processors(), Grammar(library, VOCAB)
    processors.append(grammar)
    return SkipForced(Sampling(processors), grammar)


def random_logits(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def masked(library: Library, row: Row, logits: Tensor) -> Tensor:
    changed = logits.clone()
    Grammar(library, VOCAB).apply([row], [0], changed)
    return changed


def test_allowed_tokens_begin_a_text_of_the_language(make_row: Any, library: Library, tokenizer: Any) -> None:
    """Against an oracle of its own: every token of the vocabulary is tried on every beginning of a date."""
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(VOCAB)]
    special = {token for token, about in tokenizer.get_added_tokens_decoder().items() if about.special}
    for text in ("", "1", "20", "2024-0", "2024-02-2", "2024-02-29"):
        output = tokenizer.encode(text, add_special_tokens=False).ids
        left = masked(library, make_row(output=output, eos=(EOS,), structured_output=DATE), torch.zeros(1, VOCAB))[0]
        pattern = "dddd-dd-dd"

        def begins(candidate: str, pattern: str = pattern) -> bool:
            return len(candidate) <= len(pattern) and all(
                c in "0123456789" if p == "d" else c == p for c, p in zip(candidate, pattern, strict=False)
            )

        wanted = {t for t in range(VOCAB) if texts[t] and "�" not in texts[t] and begins(text + texts[t])} - special
        if len(text) == len(pattern):
            wanted.add(EOS)
        found = {t for t in (left == 0).nonzero().flatten().tolist() if "�" not in texts[t]}
        assert found == wanted, (text, found ^ wanted)


def test_other_rows_are_not_touched(make_row: Any, library: Library) -> None:
    rows = [make_row(key=0), make_row(key=1, structured_output=DATE), make_row(key=2, temperature=0.0)]
    rows.append(make_row(key=3, structured_output=COLOURS, eos=(EOS,)))
    logits = random_logits(4, 0)
    changed = logits.clone()
    processors = Processors()
    processors.append(Grammar(library, VOCAB))
    processors.apply(rows, changed)
    for place in (0, 2):
        assert torch.equal(changed[place], logits[place])
    for place in (1, 3):
        assert torch.equal(changed[place], masked(library, rows[place], logits[place : place + 1])[0])
        left = changed[place] > -torch.inf
        assert 0 < left.sum() < VOCAB
        assert torch.equal(changed[place][left], logits[place][left])


def test_a_matcher_follows_its_row(make_row: Any, library: Library, tokenizer: Any) -> None:
    """One token on, several on, back to a shorter or another output, a new key: each as from the beginning."""
    outputs = [[], ["20"], ["20", "24"], ["20", "24", "-", "0"], ["20", "2"], ["19"], [], ["2", "0", "2", "4", "-"]]
    grammar = Grammar(library, VOCAB)
    for key in (0, 0, 7):
        for texts in outputs:
            output = [tokenizer.token_to_id(c) for text in texts for c in text]
            row = make_row(key=key, output=output, structured_output=DATE, eos=(EOS,))
            found = torch.zeros(1, VOCAB)
            grammar.apply([row], [0], found)
            assert torch.equal(found, masked(library, row, torch.zeros(1, VOCAB)))
    grammar.release(0)
    grammar.release(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_random_logits_give_texts_of_the_language(
    temperature: float, make_row: Any, library: Library, tokenizer: Any
) -> None:
    chooser = strategy(library)
    outputs: list[list[int]] = [[] for _ in range(12)]
    rows = [
        make_row(
            key=key,
            output=outputs[key],
            eos=(EOS,),
            structured_output=[DATE, COLOURS, None][key % 3],
            temperature=temperature,
            seed=key,
        )
        for key in range(12)
    ]
    live = list(range(12))
    for step in range(11):
        found = chooser.decide([rows[key] for key in live], random_logits(len(live), step))
        for way, key in zip(found, list(live), strict=True):
            outputs[key] += way.token_ids
            if way.token_ids[-1] == EOS and key % 3 < 2:
                live.remove(key)
    for key in range(12):
        text = tokenizer.decode(outputs[key], skip_special_tokens=True)
        if key % 3 == 0:
            assert re.fullmatch(DATE.text, text)
        elif key % 3 == 1:
            assert text in ("red", "green", "blue")
    assert all(key % 3 == 2 for key in live)


def test_the_distribution_is_the_renormalised_one(make_row: Any, tmp_path: Path) -> None:
    """Over a small vocabulary, for many draws' sake."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    small = Tokenizer(models.BPE())
    small.pre_tokenizer, small.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=301, special_tokens=["<eos>"], initial_alphabet=alphabet)
    small.train_from_iterator(["red green blue bluish reddish greens rebound grebe"] * 9, trainer)
    small.save(str(tmp_path / "tokenizer.json"))
    vocab, draws, batch = small.get_vocab_size(), 20_480, 512
    library = Library(load_vocabulary(tmp_path, vocab, (0,)))
    wanted = StructuredOutput("regex", "(red|green|blue|[a-f]+)?")
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5))
    changed = logits.clone()
    Grammar(library, vocab).apply([make_row(structured_output=wanted, eos=(0,))], [0], changed)
    p = torch.softmax(changed[0].double(), 0)
    kept = p.nonzero().flatten().numpy()
    assert 12 < len(kept) < 60 and 0 in kept
    counts = np.zeros(vocab)
    processors, grammar = Processors(), Grammar(library, vocab)
    processors.append(grammar)
    chooser = Sampling(processors)
    for first in range(0, draws, batch):
        rows = [make_row(key=key, structured_output=wanted, eos=(0,), seed=first + key) for key in range(batch)]
        for way in chooser.decide(rows, logits.repeat(batch, 1)):
            counts[way.token_ids[0]] += 1
    assert counts[kept].sum() == draws
    expected = p.numpy()[kept] * draws
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    degrees = len(kept) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


def test_a_row_draws_the_same_alone_and_in_a_batch(make_row: Any, library: Library) -> None:
    wanted = [DATE, None, COLOURS, POINT, None, DATE]
    rows = [make_row(key=key, structured_output=each, eos=(EOS,), seed=9) for key, each in enumerate(wanted)]
    logits = random_logits(6, 3)
    together = [way.token_ids for way in strategy(library).decide(rows, logits.clone())]
    for place in range(6):
        alone = strategy(library).decide([rows[place]], logits[place : place + 1].clone())
        assert alone[0].token_ids == together[place]


def test_it_ends_where_nothing_else_is_left(make_row: Any, library: Library, tokenizer: Any) -> None:
    """Too short for min_new_tokens, but the language has nothing more."""
    output = tokenizer.encode("green", add_special_tokens=False).ids
    stopping = StoppingParams(99, min_new_tokens=50)
    whole = make_row(output=output, eos=(EOS,), structured_output=COLOURS, stopping=stopping)
    assert strategy(library).decide([whole], random_logits(1, 1))[0].token_ids == (EOS,)
    more = make_row(output=[], eos=(EOS,), structured_output=StructuredOutput("regex", "a*"), stopping=stopping)
    assert strategy(library).decide([more], random_logits(1, 1))[0].token_ids != (EOS,)


def test_a_request_that_leaves_no_token_is_refused(make_row: Any, library: Library, tokenizer: Any) -> None:
    red = [tokenizer.token_to_id(text) for text in ("r", "re", "red")]
    stopping = StoppingParams(99, min_new_tokens=9, stop_token_ids=tuple(red))
    row = make_row(eos=(EOS,), structured_output=StructuredOutput("choice", '["red"]'), stopping=stopping)
    with pytest.raises(InvalidField, match="no token is left"):
        strategy(library).decide([row], random_logits(1, 1))


def test_a_limit_that_is_met_on_the_way_is_named(make_row: Any, library: Library, tokenizer: Any) -> None:
    row = make_row(eos=(EOS,), output=tokenizer.encode("zzz").ids, structured_output=COLOURS)
    with pytest.raises(InvalidField, match=r"structured_output\.choice cannot go on after 2 tokens"):
        strategy(library).decide([row], random_logits(1, 1))


def complete(chooser: SkipForced, row: Row, logits: Sequence[Tensor], output: list[int]) -> int:
    """Decide until the row ends; how many steps that took."""
    for step, each in enumerate(logits):
        (way,) = chooser.decide([row], each.clone())
        output += way.token_ids
        if way.token_ids[-1] == EOS:
            return step + 1
    raise AssertionError("it did not end")


def test_forced_text_is_skipped_and_is_the_same_text(make_row: Any, library: Library, tokenizer: Any) -> None:
    """The logits of this model say nothing but what digit comes next, so that both ways write the same numbers."""
    numbers = torch.full((1, VOCAB), -5.0)
    for digit in "0123456789":
        numbers[0, tokenizer.token_to_id(digit)] = 3.0 if digit == "7" else 0.0
    numbers[0, tokenizer.token_to_id("}")] = 4.0
    numbers[0, EOS] = 9.0
    for close in (",", '",', '"'):
        numbers[0, tokenizer.token_to_id(close)] = 3.5
    texts, steps = [], []
    for skip in (False, True):
        output: list[int] = []
        wanted = StructuredOutput(POINT.kind, POINT.text, skip)
        row = make_row(output=output, structured_output=wanted, eos=(EOS,), temperature=0.0)
        steps.append(complete(strategy(library), row, [numbers] * 200, output))
        texts.append(tokenizer.decode(output, skip_special_tokens=True))
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["first_coordinate"] == json.loads(texts[0])["second_coordinate"] == 7
    assert steps[1] < 0.7 * steps[0], steps


@pytest.mark.parametrize("way", [cut, cut_on_device])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 77, 331])
def test_a_mask_is_cut_from_logits(vocab: int, way: Callable[..., Tensor]) -> None:
    generator = np.random.default_rng(vocab)
    masks = generator.integers(-(2**31), 2**31, (5, (vocab + 31) // 32), dtype=np.int64).astype(np.int32)
    masks[0], masks[1] = 0, -1
    logits = torch.randn(5, vocab)
    wanted = logits.clone()
    for row in range(5):
        for token in range(vocab):
            if not int(masks[row, token // 32]) >> (token % 32) & 1:
                wanted[row, token] = -torch.inf
    changed = logits.clone()
    assert way(changed, masks) is changed
    assert torch.equal(changed, wanted)


def test_on_another_device_rows_wait_for_the_host(make_row: Any, library: Library) -> None:
    chooser = strategy(library)
    assert chooser.can_begin(make_row(key=0))
    assert not chooser.can_begin(make_row(key=1, structured_output=DATE))
