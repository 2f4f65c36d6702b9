"""What the process that fetches an adapter is told, and what it answers; each is one line of JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """source: an address that is allowed. root: of the `Store`. max_weights_bytes: of the files of tensors
    together. cache_bytes: that the store may have afterwards, None: any number.

    first_wait: most seconds before the second attempt, twice as many before each next.
    plain_http: servers on this machine are asked without TLS, for tests; no setting leads here.
    """

    source: str
    root: str
    max_weights_bytes: int
    cache_bytes: int | None = None
    first_wait: float = 0.5
    plain_http: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The revision, or the error as `errors.from_wire` takes it. reason: what lies behind it, for the log."""

    revision: str = ""
    kind: str = ""
    message: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    reason: str = ""
