"""Turns token ids into text as they come, whole characters only.

`ByteLevelDetokenizer`: text = UTF-8 decoding of the concatenated bytes of the tokens, U+FFFD for what is no
character, which is what `tokenizers`' ByteLevel decoder computes over the whole list. A token's bytes are looked
up once, so a token costs about a microsecond.

`OffsetDetokenizer`: any other decoder. text = decode(context + ids)[len(decode(context)):], where the context is
the end of the prompt, so that a decoder which strips the first space strips none of the answer. Two offsets, as
in vLLM and text-generation-inference, keep the decoded window short.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; what is no character after twice as many never will be
CONTEXT_TOKENS = 6


class Detokenizer(Protocol):
    """The text of one sequence."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is complete with these tokens."""

    def flush(self) -> str:
        """The rest: U+FFFD for each incomplete character. Nothing may be pushed afterwards."""


class ByteLevelDetokenizer:
    """For byte-level vocabularies; `token_bytes(id)` is empty for tokens that are not shown."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class OffsetDetokenizer:
    """For any decoder; the ids of `hidden` are not shown."""

    __slots__ = ("_decode", "_hidden", "_ids", "_read")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        hidden: Container[int] = (),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._hidden = hidden
        self._ids = [token_id for token_id in prompt_token_ids[-CONTEXT_TOKENS:] if token_id not in hidden]
        self._read = len(self._ids)  # ids before here have been shown

    def push(self, token_ids: Iterable[int]) -> str:
        shown = []
        for token_id in token_ids:
            if token_id not in self._hidden:
                self._ids.append(token_id)
                shown.append(self._advance(final=len(self._ids) - self._read >= MAX_HELD_TOKENS))
        return "".join(shown)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self._read == len(self._ids):
            return ""
        before = self._decode(self._ids[: self._read])
        text = self._decode(self._ids)
        if not final and (len(text) <= len(before) or text.endswith(REPLACEMENT)):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text[len(before) :]
