"""What the process that compiles grammars first is told, and what it answers; each is one line of JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What `load_vocabulary` takes."""

    folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The error as `errors.from_wire` takes it; kind is "" for a grammar that is served."""

    kind: str = ""
    message: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
