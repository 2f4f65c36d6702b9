"""Bad words and sequence breakers that are text, against the tokens that the tokenizer shows."""

from __future__ import annotations

from typing import Any

import pytest

from lorry.server.engine.messages import Dry, SamplingParams
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import SamplingTexts
from lorry.server.frontend.sampling_texts import BREAKERS, tokenized
from lorry.server.frontend.tokenizer import NoTokenizer


def tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def test_a_word_is_forbidden_with_and_without_a_space_before_it(tokenizer: Any) -> None:
    texts = SamplingTexts(bad_words=(("lazy", "a"), (" dog", "b"), ("你好", "c")))
    found = tokenized(SamplingParams(bad_words=((5, 6), tokens(tokenizer, " dog"))), texts, tokenizer)
    wanted = [(5, 6), *(tokens(tokenizer, text) for text in (" dog", "lazy", " lazy", "你好", " 你好"))]
    assert list(found.bad_words) == wanted


@pytest.mark.parametrize("texts", [(), ("x", "lazy dog", "\n")])
def test_a_breaker_is_its_last_token_behind_a_letter(tokenizer: Any, texts: tuple[str, ...]) -> None:
    found = tokenized(SamplingParams(dry=Dry(1.5, range=9)), SamplingTexts(sequence_breakers=texts), tokenizer)
    wanted = tuple(dict.fromkeys(tokens(tokenizer, "a" + text)[-1] for text in texts or BREAKERS))
    assert found.dry == Dry(1.5, range=9, sequence_breakers=wanted)


def test_what_has_no_text_is_not_touched(tokenizer: Any) -> None:
    plain = SamplingParams(top_k=3, bad_words=((1,),))
    assert tokenized(plain, SamplingTexts(), tokenizer) is plain


def test_without_a_tokenizer_text_is_refused_by_its_field() -> None:
    with pytest.raises(InvalidField, match="no tokenizer") as caught:
        tokenized(SamplingParams(), SamplingTexts(bad_words=(("x", "spec.sampling.bad_words[0].text"),)), NoTokenizer())
    assert caught.value.fields["field"] == "spec.sampling.bad_words[0].text"
    dry = SamplingParams(dry=Dry(1.0))
    with pytest.raises(InvalidField, match="sequence breakers"):
        tokenized(dry, SamplingTexts(sequence_breakers=("x",)), NoTokenizer())
    assert tokenized(dry, SamplingTexts(), NoTokenizer()).dry == Dry(1.0)
