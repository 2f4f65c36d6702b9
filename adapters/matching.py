"""Which modules a PEFT config means, and which pattern gives a module its rank and alpha; as PEFT 0.21 decides it.

    pattern:        the first key for which `(.*\\.)?(key)$` matches the module's path, in the file's order
    target, string: the regular expression matches the whole path; "all-linear": every linear but the output head
    target, list:   the path is in the list or ends with "." and one of it; only the latter are filtered by layer
    exclude:        as target, and wins over it

Source: peft/utils/other.py (`get_pattern_key`) and peft/tuners/tuners_utils.py (`check_target_module_exists`).
Regular expressions come from strangers: they run with a time limit and without the interpreter lock.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import regex  # type: ignore[import-untyped]

from lorry.adapters.errors import MalformedAdapter

MAX_PATTERN_LENGTH = 4096
TIME_LIMIT = 2.0  # seconds for all patterns of one config

_FIRST_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."


class Matcher:
    """Compiled patterns of one config under one time limit, which starts with the first match."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._deadline: float | None = None

    def match(self, pattern: str, path: str, field: str, whole: bool = False) -> regex.Match[str] | None:
        """`re.match(pattern, path)`, or `re.fullmatch` for the `whole` path.

        Raises MalformedAdapter that names `field` for a pattern that is wrong or takes too long.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + TIME_LIMIT
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            compiled = self._compile(pattern, field)
            search = compiled.fullmatch if whole else compiled.match
            return search(path, timeout=left, concurrent=True)
        except TimeoutError:
            raise MalformedAdapter(
                f"{field}: its patterns take longer than {TIME_LIMIT:g} s to match, write simpler ones", field
            ) from None

    def _compile(self, pattern: str, field: str) -> regex.Pattern[str]:
        compiled = self._compiled.get(pattern)
        if compiled is None:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise MalformedAdapter(
                    f"{field}: a pattern has {len(pattern)} characters, at most {MAX_PATTERN_LENGTH} are read", field
                )
            try:
                re.compile(pattern)  # what PEFT would refuse is refused
                compiled = self._compiled[pattern] = regex.compile(pattern)
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                raise MalformedAdapter(f"{field}: {pattern[:80]!r} is no regular expression: {error}", field) from None
        return compiled

    def pattern_value(self, patterns: Iterable[tuple[str, float]], path: str, field: str) -> float | None:
        """Value of the first of `patterns` (key, value) that matches; None when none does."""
        for key, value in patterns:
            if self.match(rf"(.*\.)?({key})$", path, field):
                return value
        return None

    def names(self, modules: str | tuple[str, ...], path: str, field: str) -> bool:
        """Whether a regular expression or a list of names means the module at `path`."""
        if isinstance(modules, str):
            return self.match(modules, path, field, whole=True) is not None
        return path in modules or any(path.endswith(f".{name}") for name in modules)

    def layer_index(self, layers_pattern: tuple[str, ...], path: str) -> int | None:
        """The number of the layer that `path` lies in."""
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in layers_pattern] or [_FIRST_INDEX]
        for pattern in patterns:
            match = self.match(pattern, path, "layers_pattern")
            if match:
                index = match.groupdict().get("idx")
                return None if index is None else int(index)
        return None
