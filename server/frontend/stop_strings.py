"""Finds stop strings in text that comes in pieces, and says how much of it may be shown.

Semantics: over the whole text, the match that ends first wins, among those the one that starts first. Whatever
the pieces are, no character of that match is shown before: after each piece the longest suffix that is a proper
prefix of a stop string is held back.

An Aho-Corasick automaton (Aho & Corasick 1975) does both: the depth of its state is that suffix's length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


class StopStrings:
    """The automaton of a request's stop strings; shared by its sequences, never changed after construction."""

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop`: non-empty strings. Time and memory grow with their total length."""
        assert stop and all(stop)
        self._next: list[dict[str, int]] = [{}]
        self._depth: list[int] = [0]
        self._match: list[str] = [""]  # the longest stop string that ends in this state
        for string in stop:
            state = 0
            for character in string:
                child = self._next[state].get(character)
                if child is None:
                    child = len(self._next)
                    self._next[state][character] = child
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                    self._match.append("")
                state = child
            self._match[state] = string
        self._fail = [0] * len(self._next)
        self._held = [0] * len(self._next)  # length of the longest suffix that a stop string may still continue
        queue = deque(self._next[0].values())
        for state in queue:
            self._held[state] = 1 if self._next[state] else 0
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fail[child] = self._step(self._fail[state], character)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
                self._held[child] = self._depth[child] if self._next[child] else self._held[self._fail[child]]
                queue.append(child)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def scan(self, state: int, text: str, active: bool) -> tuple[int, int, str]:
        """(new state, characters of `text` read, stop string): reads up to the first match's end, or all.

        `active` False: matches do not count, though one that ends later may begin here.
        """
        for position, character in enumerate(text):
            state = self._step(state, character)
            if active and self._match[state]:
                return state, position + 1, self._match[state]
        return state, len(text), ""

    def held(self, state: int) -> int:
        """How many characters before `state` may still turn out to begin a stop string."""
        return self._held[state]


@dataclass(slots=True)
class StopFilter:
    """One sequence's place in the automaton, and the text that is not shown yet."""

    strings: StopStrings
    state: int = 0
    pending: str = ""

    def push(self, text: str, active: bool) -> tuple[str, str]:
        """(text that may be shown, stop string or ""). After a stop string nothing may be pushed any more.

        The shown text ends where the stop string begins.
        """
        self.state, read, stop = self.strings.scan(self.state, text, active)
        if stop:
            shown = (self.pending + text[:read])[: -len(stop)]
            self.pending = ""
            return shown, stop
        whole = self.pending + text
        cut = len(whole) - self.strings.held(self.state)
        self.pending = whole[cut:]
        return whole[:cut], ""

    def flush(self) -> str:
        """The text that was held back, when no stop string will follow."""
        text, self.pending = self.pending, ""
        return text
