"""Bars on a terminal, a few lines elsewhere."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from lorry.server.engine.messages import Loading
from lorry.server.frontend.progress import LoadingProgress


def run(console):
    with LoadingProgress(console) as progress:
        for done in range(1, 31):
            progress(Loading("quantize", done, 30))
        progress(Loading("load", 30, 30))
        progress(Loading("warm up", 0, 0))
    progress(Loading("load", 7, 30))


def test_lines_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    run(Console(file=stream, force_terminal=False))
    assert caplog.messages == ["quantize: 3%", "quantize: 100%", "load: 100%", "warm up: 100%", "load: 23%"]
    assert stream.getvalue() == ""


def test_bars_on_a_terminal(caplog):
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    run(Console(file=stream, force_terminal=True, width=80, _environ={"TERM": "xterm"}))
    assert caplog.messages == ["load: 23%"], "a later start is told of in lines"
    assert "quantize" in stream.getvalue() and "100%" in stream.getvalue()
