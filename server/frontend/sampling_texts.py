"""Text among the sampling parameters becomes token ids: bad words, and DRY's sequence breakers."""

from __future__ import annotations

import msgspec

from lorry.server.engine.messages import SamplingParams
from lorry.server.errors import InvalidField
from lorry.server.frontend.request import SamplingTexts
from lorry.server.frontend.tokenizer import Tokenizer

BREAKERS = ("\n", ":", '"', "*")  # what text-generation-webui and llama.cpp take where nobody says anything


def tokenized(sampling: SamplingParams, texts: SamplingTexts, tokenizer: Tokenizer) -> SamplingParams:
    """`sampling` with the tokens of the texts.

    Raises InvalidField for text that has no tokens, or that the model, having no tokenizer, cannot read.
    """
    changes: dict[str, object] = {}
    if texts.bad_words:
        words = [ids for text, field in texts.bad_words for ids in word_tokens(text, field, tokenizer)]
        changes["bad_words"] = tuple(dict.fromkeys((*sampling.bad_words, *words)))
    if sampling.dry is not None:
        breakers = breaker_tokens(texts.sequence_breakers, tokenizer)
        changes["dry"] = msgspec.structs.replace(sampling.dry, sequence_breakers=breakers)
    return msgspec.structs.replace(sampling, **changes) if changes else sampling


def word_tokens(text: str, field: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of a text as it stands, and behind a space where it does not begin with one."""
    if not tokenizer.knows_text:
        raise InvalidField("the model has no tokenizer: send token ids", field=field)
    spellings = (text,) if text[0].isspace() else (text, " " + text)
    found = [tuple(tokenizer.encode(spelling, add_special_tokens=False)) for spelling in spellings]
    if not all(found):
        raise InvalidField(f"{field} is {text!r}, which has no tokens; accepted: text that has some", field=field)
    return list(dict.fromkeys(found))


def breaker_tokens(texts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The last token of each text where it follows a letter: by itself it may have another spelling."""
    if not tokenizer.knows_text:
        if texts:
            field = "spec.sampling.dry.sequence_breakers"
            raise InvalidField("the model has no tokenizer: leave the sequence breakers empty", field=field)
        return ()
    ids = (tokenizer.encode("a" + text, add_special_tokens=False) for text in texts or BREAKERS)
    return tuple(dict.fromkeys(each[-1] for each in ids if each))
