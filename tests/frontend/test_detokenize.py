"""Pieces of text against `tokenizers`' own decoding of the whole list."""

from __future__ import annotations

import backends
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.server.frontend.detokenize import MAX_HELD_TOKENS, REPLACEMENT
from lorry.server.frontend.tokenizer import Tokenizer

BYTES = Tokenizer(backends.byte_level())
VOCABULARY = backends.byte_level().get_vocab_size()
PIECES = Tokenizer(backends.sentencepiece())


def chunks(draw, ids):
    while ids:
        size = draw(st.integers(1, 5))
        yield ids[:size]
        ids = ids[size:]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_byte_level_equals_decoding_the_whole_list(data):
    ids = data.draw(st.lists(st.integers(0, VOCABULARY + 3), max_size=40))
    detokenizer = BYTES.detokenizer()
    pieces = [detokenizer.push(chunk) for chunk in chunks(data.draw, ids)]
    assert "".join(pieces) + detokenizer.flush() == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte_level", "sentencepiece"])
def test_only_whole_characters_of_real_text_are_shown(tokenizer, text):
    prompt = tokenizer.encode("the dog")
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(prompt)
    pieces = [detokenizer.push([token]) for token in ids]
    assert all(REPLACEMENT not in piece for piece in pieces) or REPLACEMENT in text
    expected = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    assert "".join(pieces) + detokenizer.flush() == expected


@pytest.mark.parametrize("text", ["👩‍👩‍👧 🎉", "你好世界", "naïve café", "🇩🇪", " two  spaces ", "\n\n    tab\t"])
@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte_level", "sentencepiece"])
def test_text_of_a_reply_is_the_text_that_was_encoded(tokenizer, text):
    ids = tokenizer.encode("the " + text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer(tokenizer.encode(""))
    shown = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
    assert shown == "the " + text


def test_the_first_space_of_a_reply_is_kept_after_a_prompt():
    prompt = PIECES.encode("over")
    dog = PIECES.encode("dog", add_special_tokens=False)
    assert PIECES.decode(dog) == "dog"
    assert PIECES.detokenizer(prompt).push(dog) == " dog"


def test_special_tokens_are_not_shown_and_keep_the_spaces_around_them():
    the, end = PIECES.encode("the", add_special_tokens=False), 2
    detokenizer = PIECES.detokenizer(PIECES.encode("dog"))
    shown = detokenizer.push([*the, *[end] * 20, *the])
    assert shown == " the the"


def test_bytes_that_never_form_a_character_do_not_pile_up():
    continuation_byte = 3 + 0x80
    detokenizer = PIECES.detokenizer()
    shown = [detokenizer.push([continuation_byte]) for _ in range(MAX_HELD_TOKENS * 5)]
    assert "".join(shown) == REPLACEMENT * (MAX_HELD_TOKENS * 5)


def test_an_incomplete_character_is_shown_as_replacement_at_the_end():
    ids = BYTES.encode("🎆", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = BYTES.detokenizer()
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == BYTES.decode(ids[:-1]) == REPLACEMENT
