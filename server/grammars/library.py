"""The grammars that were compiled for one vocabulary, by their content.

The newest are kept; a grammar that a request holds stays findable whether or not it is among them.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from weakref import WeakValueDictionary

from llguidance import LLTokenizer

from lorry.server.grammars.compiling import Compiled, compiled
from lorry.server.params import StructuredOutput

KEPT = 32  # at most 40 MB each, usually less than one
KEPT_CHARACTERS = 8 << 20  # of their texts together

Key = tuple[str, str]


class Library:
    """Thread-safe: a thread compiles while the engine's looks up."""

    def __init__(self, vocabulary: LLTokenizer, kept: int = KEPT) -> None:
        self._vocabulary = vocabulary
        self._kept = kept
        self._newest: OrderedDict[Key, Compiled] = OrderedDict()
        self._alive: WeakValueDictionary[Key, Compiled] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._seconds: list[float] = []

    def find(self, wanted: StructuredOutput) -> Compiled | None:
        """The grammar if it is at hand."""
        key = wanted.kind, wanted.text
        with self._lock:
            found = self._alive.get(key)
            if key in self._newest:
                self._newest.move_to_end(key)
            return found

    def compile(self, wanted: StructuredOutput) -> Compiled:
        """The grammar, compiled unless it is at hand; raises InvalidField."""
        if (found := self.find(wanted)) is not None:
            return found
        start = time.perf_counter()
        grammar = compiled(wanted, self._vocabulary)
        with self._lock:
            self._seconds.append(time.perf_counter() - start)
            self._alive[wanted.kind, wanted.text] = grammar
            self._newest[wanted.kind, wanted.text] = grammar
            while len(self._newest) > self._kept or self._characters() > KEPT_CHARACTERS:
                self._newest.popitem(last=False)
        return grammar

    def take_seconds(self) -> list[float]:
        """How long each compilation took since the last call."""
        with self._lock:
            taken, self._seconds = self._seconds, []
            return taken

    def _characters(self) -> int:
        return sum(len(text) for _, text in self._newest)
