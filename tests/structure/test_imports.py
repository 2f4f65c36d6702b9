"""Imports point one way: kernels ◀ adapters ◀ server (errors, config, params ◀ grammars, cache, decoding, model ◀
engine ◀ frontend ◀ rpc ◀ app ◀ commands ◀ cli), protobuf stays at the edge, and the loop's process knows no network."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"

LEAVES = {"lorry", "lorry.server.errors", "lorry.server.config", "lorry.server.params"}

# What an adapter's files are called; it loads nothing, so that those who fetch files know it too.
NAMES = {"lorry.adapters.errors", "lorry.adapters.reading.strict_json", "lorry.adapters.reading.shards"}
ADAPTERS = NAMES | {"lorry.adapters"}

# A room may import itself and what stands here. The longest name that a module's name begins with is its room.
ALLOWED: dict[str, set[str]] = {
    "lorry": set(),
    "lorry.v1": set(),
    "lorry.kernels": set(),
    "lorry.adapters.errors": set(),
    "lorry.adapters.reading.strict_json": {"lorry.adapters.errors"},
    "lorry.adapters.reading.shards": {"lorry.adapters.errors", "lorry.adapters.reading.strict_json"},
    "lorry.adapters": NAMES | {"lorry.kernels"},
    "lorry.server.errors": set(),
    "lorry.server.params": {"lorry.server.errors"},
    "lorry.server.config": {"lorry.server.errors", "lorry.server.params"},
    # The messages are a leaf of their own, so that the frontend can speak them without loading the engine.
    "lorry.server.engine.messages": LEAVES,
    "lorry.server.observability": LEAVES | {"lorry.server.engine.messages"},
    "lorry.server.cache": LEAVES | {"lorry.kernels"},
    "lorry.server.grammars": LEAVES,
    "lorry.server.decoding": LEAVES | {"lorry.kernels", "lorry.server.grammars"},
    "lorry.server.model": LEAVES | ADAPTERS | {"lorry.kernels", "lorry.server.cache"},
    "lorry.server.engine": LEAVES
    | ADAPTERS
    | {
        "lorry.kernels",
        "lorry.server.cache",
        "lorry.server.grammars",
        "lorry.server.decoding",
        "lorry.server.model",
        "lorry.server.observability",
        "lorry.server.engine.messages",
    },
    "lorry.server.sources": LEAVES | NAMES,
    "lorry.server.frontend": LEAVES
    | {
        "lorry.server.engine.messages",
        "lorry.server.grammars",
        "lorry.server.model",
        "lorry.server.observability",
        "lorry.server.sources",
    },
    "lorry.server.rpc": LEAVES
    | {"lorry.v1", "lorry.server.frontend", "lorry.server.engine.messages", "lorry.server.observability"},
    "lorry.server.app": LEAVES
    | {
        "lorry.server.rpc",
        "lorry.server.frontend",
        "lorry.server.engine.messages",
        "lorry.server.observability",
    },
    "lorry.server.commands": LEAVES | {"lorry.v1", "lorry.server.app", "lorry.server.model", "lorry.server.sources"},
    "lorry.server.cli": {"lorry", "lorry.server.commands"},
}

NETWORK = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "aiohttp", "http", "requests"}

# Packages of others that a room must not import.
FORBIDDEN: dict[str, set[str]] = {
    "lorry.kernels": NETWORK | {"asyncio", "transformers", "bitsandbytes", "peft", "zmq"},
    "lorry.adapters": NETWORK | {"asyncio", "transformers", "bitsandbytes", "peft", "zmq"},
    "lorry.server.cache": NETWORK | {"asyncio"},
    "lorry.server.grammars": NETWORK | {"asyncio", "torch", "zmq"},
    "lorry.server.decoding": NETWORK | {"asyncio"},
    "lorry.server.model": NETWORK | {"asyncio", "bitsandbytes", "peft"},
    "lorry.server.engine": NETWORK | {"asyncio", "bitsandbytes", "peft"},
    "lorry.server.frontend": {"grpc", "google"},
}


def room(module: str) -> str | None:
    """The longest room that `module` lies in; None when it is in none."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in ALLOWED and (name != "lorry" or len(parts) == 1):
            return name
    return None


def modules(src: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every module of the package, through the links."""

    def walk(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name.isidentifier() and path.name != "__pycache__":
                yield from walk(path, f"{name}.{path.name}")
            elif path.suffix == ".py":
                yield name if path.stem == "__init__" else f"{name}.{path.stem}", path

    yield from walk(src / "lorry", "lorry")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, wherever the statement stands in it.

    `from a import b` gives `a.b`: whether b is a module or a value, its room is that of the longest known prefix.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"


def target_room(name: str) -> str | None:
    """The room of an imported name; a value of the root package, such as its version, is the root's."""
    found = room(name)
    return "lorry" if found is None and name.count(".") == 1 else found


def violations(src: Path) -> list[str]:
    """One line for every import that points the wrong way, and for every module that lies in no room."""
    found = []
    for module, path in modules(src):
        own = room(module)
        if own is None:
            found.append(f"{module}: lies in no room")
            continue
        if own == "lorry.v1":
            continue
        for line, name in imports(path):
            top = name.partition(".")[0]
            if not top:
                found.append(f"{module}:{line}: relative import of {name}")
            elif top != "lorry":
                forbidden = next((f for r, f in FORBIDDEN.items() if module == r or module.startswith(f"{r}.")), set())
                if top in forbidden:
                    found.append(f"{module}:{line}: {own} must not import {top}")
            else:
                target = target_room(name)
                if target != own and target not in ALLOWED[own]:
                    found.append(f"{module}:{line}: {own} must not import {name}")
    return found


def test_every_import_points_the_allowed_way() -> None:
    assert violations(SRC) == []


def test_the_table_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, allowed in ALLOWED.items() if name not in done and allowed <= done | {name}}
        assert ready, f"cycle among {sorted(ALLOWED.keys() - done)}"
        done |= ready


@pytest.mark.parametrize(
    ("file", "text", "report"),
    [
        ("kernels/rope.py", "import lorry.adapters.pool", "lorry.kernels must not import lorry.adapters.pool"),
        ("kernels/rope.py", "from lorry import server", "lorry.kernels must not import lorry.server"),
        ("kernels/rope.py", "from . import nf4", "relative import of ."),
        ("adapters/pool.py", "from lorry.server.errors import NotFound", "lorry.adapters must not import lorry.server"),
        ("adapters/pool.py", "def f():\n    import grpc", "lorry.adapters must not import grpc"),
        ("server/errors.py", "from lorry.server import config", "lorry.server.errors must not import lorry.server"),
        ("server/cache/blocks.py", "from lorry.server.engine.loop import Loop", "lorry.server.cache must not import"),
        ("server/model/load.py", "from lorry.server.decoding import interface", "lorry.server.model must not import"),
        ("server/engine/loop.py", "import asyncio", "lorry.server.engine must not import asyncio"),
        ("server/engine/loop.py", "from lorry.server.frontend import output", "lorry.server.engine must not import"),
        (
            "server/engine/messages.py",
            "import zmq\nfrom lorry.kernels import lora",
            "lorry.server.engine.messages must",
        ),
        ("server/frontend/output.py", "from lorry.v1 import generation_pb2", "lorry.server.frontend must not import"),
        ("server/frontend/output.py", "from lorry.server.engine import loop", "lorry.server.frontend must not import"),
        ("server/rpc/convert.py", "if True:\n    from lorry.server.cli import app", "lorry.server.rpc must not import"),
        ("server/attic/old.py", "", "lorry.server.attic.old: lies in no room"),
    ],
)
def test_a_wrong_import_is_reported(tmp_path: Path, file: str, text: str, report: str) -> None:
    path = tmp_path / "lorry" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert report in found[0]


def test_the_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    texts = {
        "__init__.py": "__version__ = '0'",
        "kernels/lora.py": "import torch\nfrom lorry.kernels.nf4 import quantize\nfrom lorry.kernels import rope",
        "adapters/pool.py": "from lorry.kernels.lora import AdapterPages",
        "server/engine/loop.py": "from lorry.server.engine.messages import Tokens\nfrom lorry.adapters import pool",
        "server/rpc/control.py": "import grpc\nfrom lorry import __version__\nfrom lorry.v1 import x_pb2",
        "v1/x_pb2_grpc.py": "import grpc\nfrom lorry.v1 import x_pb2",
    }
    for name, text in texts.items():
        path = tmp_path / "lorry" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == []
