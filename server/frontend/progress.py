"""The engine's progress while it loads: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from lorry.server.engine.messages import Loading

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class LoadingProgress:
    """Call it with each Loading; as a context manager it takes its bars away at the end."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(file=sys.stderr)
        self._bars: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._bars = Progress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=console,
                redirect_stdout=False,
            )
        self._tasks: dict[str, TaskID] = {}
        self._next_line: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None  # an engine that is started again later is told of in lines

    def __call__(self, loading: Loading) -> None:
        if self._bars is None:
            self._line(loading)
            return
        if loading.stage not in self._tasks:
            self._tasks[loading.stage] = self._bars.add_task(loading.stage, total=loading.total)
        self._bars.update(self._tasks[loading.stage], completed=loading.done, total=loading.total)

    def _line(self, loading: Loading) -> None:
        now, finished = time.monotonic(), loading.done >= loading.total
        if not finished and now < self._next_line.get(loading.stage, 0.0):
            return
        self._next_line[loading.stage] = 0.0 if finished else now + SECONDS_BETWEEN_LINES
        share = 100 * loading.done // loading.total if loading.total else 100
        logger.info("%s: %d%%", loading.stage, share)
