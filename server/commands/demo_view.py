"""Answers that grow side by side: columns on a terminal, whole paragraphs elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lorry.server.commands.demo_run import Answer

_NARROWEST = 22  # columns of a terminal that one answer needs


class _Columns:
    """Renders the answers as they are at the moment of rendering."""

    def __init__(self, question: str, answers: Sequence[Answer]) -> None:
        self._question, self._answers = question, answers

    def __rich__(self) -> RenderableType:
        grid = Table.grid(expand=True)
        for _ in self._answers:
            grid.add_column(ratio=1)
        grid.add_row(*(self._panel(answer) for answer in self._answers))
        return Panel(grid, title=escape(self._question), border_style="dim")

    def _panel(self, answer: Answer) -> Panel:
        return Panel(
            Text(answer.text),
            title=f"[bold]{escape(answer.title)}[/bold]",
            subtitle=f"{answer.tokens} tokens",
            border_style="green" if answer.finished else "yellow",
        )


@contextlib.contextmanager
def view(console: Console, question: str, answers: Sequence[Answer]) -> Iterator[None]:
    """Show `answers` while they grow and once more when they are whole."""
    if console.is_terminal and console.width >= _NARROWEST * len(answers):
        with Live(_Columns(question, answers), console=console, refresh_per_second=20):
            yield
        return
    console.print(f"question: {question}", markup=False, highlight=False)
    yield
    for answer in answers:
        text = f"[{answer.title}] {' '.join(answer.text.split())} ({answer.tokens} tokens)"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
