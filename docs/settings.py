"""Write the table of settings in README.md from the options of `lorry serve`; with `--check` only compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from lorry.server.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- settings: written by docs/settings.py -->\n", "<!-- end of settings -->\n"


def table() -> str:
    """One row for each option: its name, its default, its sentence."""
    group: Any = typer.main.get_command(app)
    rows = ["| option | default | |", "|---|---|---|"]
    for option in group.commands["serve"].params:
        shown = "" if option.default in (None, [], ()) else f"`{option.default}`"
        rows.append(f"| `{option.opts[0]}` | {shown} | {option.help} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = before + BEGIN + table() + END + after
    if "--check" in sys.argv[1:]:
        if text != wanted:
            print(
                "README.md lacks a setting or has it wrong: run python docs/settings.py",
                file=sys.stderr,
            )
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
