"""Options of `lorry serve`: one for each field of ServerConfig and EngineConfig, with its type, default and sentence.

The sentence under a field in `config.py` is its help, so that a setting is described in one place.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from typing import Annotated, Any

import typer

from lorry.server import config
from lorry.server.commands import values
from lorry.server.config import EngineConfig, ServerConfig
from lorry.server.errors import InvalidField

_SIZES = {"kv_memory", "adapter_memory", "adapter_host_memory", "adapter_cache_size", "max_message_bytes"}
_NAMES = {"adapters_dir": "--adapters", "adapter_roots": "--adapter-root", "adapter_sources": "--adapter-source"}
_LEAST = {"port": 0, "metrics_port": 0, "drain_timeout": 0, "seed": 0, "restart_backoff": 0, "restart_backoff_max": 0}
_SHARES = {"gpu_memory_fraction"}
_METAVARS = {"adapters_dir": "DIR", "adapter_roots": "DIR", "adapter_sources": "PREFIX"}


def _sentences() -> dict[tuple[str, str], str]:
    """(class, field) → the string that follows the field in `config.py`."""
    found = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                    found[node.name, name] = " ".join(sentence.split())
    return found


def _parameter(field: dataclasses.Field[Any], kind: Any, sentence: str) -> inspect.Parameter:
    """The option for one field. Sizes are written with units, tuples by repeating the option."""
    name = _NAMES.get(field.name, "--" + field.name.replace("_", "-"))
    default = field.default
    sentence = sentence.replace("None:", "unset:").replace("`adapters_dir`", "--adapters")
    sentence = sentence.replace("`adapter_memory`", "--adapter-memory")
    extra: dict[str, Any] = {"help": sentence, "metavar": _METAVARS.get(field.name)}
    if kind in (int, float, int | None):
        extra["min"] = 0 if field.name in _SHARES else _LEAST.get(field.name, 1)
        extra["max"] = 1 if field.name in _SHARES else 65535 if field.name in ("port", "metrics_port") else None
    elif kind is bool and default:
        name += "/" + name.replace("--", "--no-", 1)
    if field.name in _SIZES:
        extra = {"help": sentence, "parser": values.size, "metavar": "SIZE"}
        kind = int | None if default is None else int
        default = values.size_text(default) if isinstance(default, int) else None
    elif typing.get_origin(kind) is tuple:
        kind, default = list[typing.get_args(kind)[0]], []  # type: ignore[misc]
        extra["show_default"] = False
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(name, **extra)],
    )


def parameters() -> list[inspect.Parameter]:
    """Keyword parameters for every field, the server's first."""
    sentences, found = _sentences(), []
    for cls in (ServerConfig, EngineConfig):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name != "engine":
                sentence = sentences[cls.__name__, field.name]
                found.append(_parameter(field, hints[field.name], sentence))
    return found


def build(options: dict[str, Any]) -> ServerConfig:
    """The configuration from the options' values; raises typer.BadParameter for those that exclude each other."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    engine_fields = {field.name for field in dataclasses.fields(EngineConfig)}
    try:
        engine = EngineConfig(**{name: value for name, value in options.items() if name in engine_fields})
    except InvalidField as error:
        option = "--" + error.fields["field"].replace("_", "-")
        raise typer.BadParameter(error.message, param_hint=option) from None
    rest = {name: value for name, value in options.items() if name not in engine_fields}
    return ServerConfig(engine=engine, **rest)
