"""The default model's vocabulary, and answers drawn at random under a grammar over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from lorry.server.grammars.compiling import Compiled
from lorry.server.grammars.vocabulary import load_vocabulary

VOCAB, EOS = 49_152, 2
CLOSING = ['"', "}", "]", '"}', "]}", "0", "1", "false", "null", ":", '":', "0}", ","]


@pytest.fixture(scope="session")
def vocabulary(smollm2_folder: Path) -> LLTokenizer:
    return load_vocabulary(smollm2_folder, VOCAB, (EOS,))


@pytest.fixture(scope="session")
def tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


@dataclass
class Walker:
    """Draws answers, all allowed tokens alike, or ever more likely what closes JSON, the longer an answer gets."""

    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = np.array([token for token, about in added.items() if about.special and token != EOS])
        found = (self.tokenizer.token_to_id(text) for text in CLOSING)
        self.closing = np.array([token for token in found if token is not None])

    def answer(self, grammar: Compiled, seed: int, most: int = 300) -> str | None:
        """One text of the language, None if it did not end within `most` tokens."""
        rng, matcher, output = np.random.default_rng(seed), grammar.matcher(), list[int]()
        for step in range(most):
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(mask, bitorder="little")[:VOCAB].astype(bool)
            assert not matcher.is_error(), matcher.get_error()
            assert not allowed[self.special].any(), "a special token would be shown as text"
            assert allowed[EOS] == matcher.is_accepting()
            going_on = np.flatnonzero(allowed)
            closing = self.closing[allowed[self.closing]]
            if len(closing) and rng.random() < step / 20:
                going_on = closing
            token = int(rng.choice(going_on))
            if token == EOS or (allowed[EOS] and rng.random() < step / 20):
                return str(self.tokenizer.decode(output, skip_special_tokens=False))
            output.append(token)
            if not matcher.consume_token(token):
                raise AssertionError(matcher.get_error()[:300])
        return None

    def accepts(self, grammar: Compiled, text: str) -> bool:
        """Whether the tokenizer's own tokens of `text` are a whole text of the language."""
        matcher = grammar.matcher()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(scope="session")
def walker(tokenizer: Tokenizer) -> Walker:
    return Walker(tokenizer)


@pytest.fixture(scope="session")
def compact() -> Callable[[object], str]:
    """A value as JSON without white space, as a grammar of JSON has it."""
    return lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))
