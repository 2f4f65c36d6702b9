"""How the demo shows its answers, and that a server that does not start is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lorry.server.cli import app
from lorry.server.commands.demo_run import Answer
from lorry.server.commands.demo_view import view


def shown(width: int, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    answers = [Answer("base", None), Answer("[odd]", "[odd]")]
    with view(console, "why [not]?", answers):
        for answer, text in zip(answers, ("one\ntwo", "three [b]four"), strict=True):
            answer.text, answer.tokens, answer.finished = text, 7, True
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_columns_on_a_terminal() -> None:
    text = shown(60, True)
    last = text[text.rindex("why [not]?") :]
    row = next(line for line in last.splitlines() if "one" in line)
    assert row.index("one") < row.index("three [b]four")
    assert "[odd]" in last
    assert last.count("7 tokens") == 2


@pytest.mark.parametrize(("width", "terminal"), [(60, False), (30, True)])
def test_paragraphs_elsewhere(width: int, terminal: bool) -> None:
    assert shown(width, terminal).splitlines() == [
        "question: why [not]?",
        "[base] one two (7 tokens)",
        "[[odd]] three [b]four (7 tokens)",
    ]


def test_a_server_that_does_not_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    arguments = ["demo", "--adapters", str(tmp_path), "--model", str(tmp_path / "nothing")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "error: the server did not start (exit code 1)" in result.stderr
    result = CliRunner().invoke(app, ["demo", "--adapters", str(tmp_path / "a")])
    assert result.exit_code == 1
    assert "no adapters in" in result.stderr
