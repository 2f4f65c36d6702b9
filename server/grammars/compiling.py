"""Compiling a grammar over a vocabulary, within limits that llguidance holds to.

They bound what one grammar can take of memory and of each step; a grammar that meets one while it is compiled is
refused, one that meets it while an answer grows ends that answer's request.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lorry.server.grammars.definition import definition, refused
from lorry.server.params import StructuredOutput

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,  # about 7 ms
    step_max_items=20_000,
    max_lexer_states=20_000,  # about 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Compiled:
    """A grammar at its beginning. Its matchers share what they find out about it, so the first is the slowest."""

    __slots__ = ("__weakref__", "_start")

    def __init__(self, start: LLMatcher) -> None:
        self._start = start

    def matcher(self) -> LLMatcher:
        """A matcher that has seen no token; about 0.1 ms."""
        return self._start.deep_copy()


def compiled(wanted: StructuredOutput, vocabulary: LLTokenizer) -> Compiled:
    """Releases Python's lock while it works; raises InvalidField naming the field and what is not served."""
    start = LLMatcher(vocabulary, definition(wanted), log_level=0, limits=LIMITS)
    if start.is_error():
        raise refused(wanted, start.get_error())
    if warnings := start.get_grammar_warnings():
        raise refused(wanted, warnings[0])
    allowed = start.compute_bitmask()  # the longest of all masks, at times by far
    if not any(allowed) or start.get_error().startswith("NoExtension"):
        raise refused(wanted, "no text of this model's tokens is in the language")
    if start.is_error():
        raise refused(wanted, start.get_error())
    return Compiled(start)
