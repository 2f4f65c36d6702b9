"""Requests whose grammar is being compiled, kept from the scheduler until it is; no step waits for one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from lorry.server.engine.messages import Abort, Generate
from lorry.server.engine.report import Report
from lorry.server.errors import InvalidField, LorryError
from lorry.server.grammars.compiling import Compiled
from lorry.server.grammars.library import Library

STACK = 16 << 20  # bytes of the thread that compiles


class GrammarDesk:
    """library: None where the model's vocabulary serves no grammars; refusal: why."""

    def __init__(self, library: Library | None, refusal: LorryError | None = None) -> None:
        self.library = library
        self.refusal = refusal or InvalidField("the model has no tokenizer", field="structured_output")
        self.hits = 0  # grammars of requests that were at hand
        self._threads = ThreadPoolExecutor(1, "grammars")
        self._held: dict[str, list[Generate | Abort]] = {}
        self._under_way: deque[tuple[str, Future[Compiled]]] = deque()

    @property
    def busy(self) -> bool:
        """Whether `ready` will bring something."""
        return bool(self._under_way)

    def wants(self, command: Generate) -> bool:
        """Whether the request waits for its grammar, and comes back from `ready`. Raises the error that refuses it."""
        wanted = command.sampling.structured_output
        if wanted is None:
            return False
        if self.library is None:
            raise self.refusal
        if self.library.find(wanted) is not None:
            self.hits += 1
            return False
        self._held[command.request_id] = [command]
        before = threading.stack_size(STACK)
        try:
            self._under_way.append((command.request_id, self._threads.submit(self.library.compile, wanted)))
        finally:
            threading.stack_size(before)
        return True

    def follows(self, command: Abort) -> bool:
        """Whether the command is for a request that waits, and comes back after it."""
        waiting = self._held.get(command.request_id)
        if waiting is not None:
            waiting.append(command)
        return waiting is not None

    def ready(self, refuse: Callable[[str, Exception], None]) -> Iterator[Generate | Abort]:
        """What need not wait any longer, in the order of the compilations; the grammars live while it is read."""
        while self._under_way and self._under_way[0][1].done():
            request_id, future = self._under_way.popleft()
            commands = self._held.pop(request_id)
            error = future.exception()
            if isinstance(error, Exception):
                refuse(request_id, error)
            else:
                yield from commands

    def grammar(self, command: Generate) -> Compiled | None:
        """What a request holds as long as it lives, so that its grammar stays at hand."""
        wanted = command.sampling.structured_output
        return None if wanted is None or self.library is None else self.library.find(wanted)

    def measure(self, report: Report) -> None:
        """What was compiled and found since the last time."""
        report.grammar_hits += self.hits
        self.hits = 0
        if self.library is not None:
            report.grammar_compile_seconds += self.library.take_seconds()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
