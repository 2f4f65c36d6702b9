"""Which modules a PEFT config means, and which pattern gives a module its rank and alpha; as PEFT 0.21 decides it.

    pattern:        the first key for which `(.*\\.)?(key)$` matches the module's path, in the file's order
    target, string: the regular expression matches the whole path; "all-linear": every linear but the output head
    target, list:   the path is in the list or ends with "." and one of it; only the latter are filtered by layer
    exclude:        as target, and wins over it

Source: peft/utils/other.py (`get_pattern_key`) and peft/tuners/tuners_utils.py (`check_target_module_exists`).
Regular expressions come from strangers: they run with a time limit and without the interpreter lock. Neither helps
while one is compiled, and `x{4294967294}` is compiled into 4 GB; so what would be is refused before.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import regex  # type: ignore[import-untyped]

from lorry.adapters.errors import MalformedAdapter

MAX_PATTERN_LENGTH = 4096
MAX_UNROLLED = 10_000  # of one pattern; measured: regex takes up to 1 KB and 3 µs for each
MAX_UNROLLED_TOGETHER = 100_000
TIME_LIMIT = 2.0  # seconds of this thread for all patterns of one config

_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_PRINTABLE = re.compile(r"[ -~]*")
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*+\]|\{(?=[\d,])(\d*),?(\d*)\}|\(\?#|\(\?[a-zA-Z-]*x|.")
# Comments and verbose mode hide brackets from the tokens above; regex reads a lone { as a fuzzy match, [: as a class.
_UNREAD = re.compile(r"\{|\[.*(?:\[:|\\[uUN]).*|\(\?.+|\\[uUN]")
_FIRST_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."


class Matcher:
    """Patterns of one config under one time limit; what was found for a field and a path is kept."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._values: dict[tuple[str, str], float | None] = {}
        self._unrolled = 0
        self._left = TIME_LIMIT

    def match(self, pattern: str, path: str, field: str, whole: bool = False) -> regex.Match[str] | None:
        """`re.match(pattern, path)`, or `re.fullmatch` for the `whole` path.

        Raises MalformedAdapter that names `field` for a pattern that is wrong or takes too long.
        """
        begun = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            compiled = self._compile(pattern, field)
            search = compiled.fullmatch if whole else compiled.match
            return search(path, timeout=self._left, concurrent=True)
        except TimeoutError:
            raise MalformedAdapter(
                f"{field}: its patterns take longer than {TIME_LIMIT:g} s to match, write simpler ones", field
            ) from None
        finally:
            self._left -= time.thread_time() - begun

    def _compile(self, pattern: str, field: str) -> regex.Pattern[str]:
        compiled = self._compiled.get(pattern)
        if compiled is None:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise MalformedAdapter(
                    f"{field}: a pattern has {len(pattern)} characters, at most {MAX_PATTERN_LENGTH} are read", field
                )
            self._unrolled += _unrolled(pattern, field)
            if self._unrolled > MAX_UNROLLED_TOGETHER:
                raise MalformedAdapter(f"{field}: its patterns repeat too much, write simpler ones", field)
            try:
                re.compile(pattern)  # what PEFT would refuse is refused
                compiled = self._compiled[pattern] = regex.compile(pattern)
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                raise MalformedAdapter(f"{field}: {pattern[:80]!r} is no regular expression: {error}", field) from None
        return compiled

    def pattern_value(self, patterns: Iterable[tuple[str, float]], path: str, field: str) -> float | None:
        """Value of the first of the field's `patterns` (key, value) that matches; None when none does."""
        if (field, path) not in self._values:
            means = (value for key, value in patterns if self._means(key, path, field))
            self._values[field, path] = next(means, None)
        return self._values[field, path]

    def _means(self, key: str, path: str, field: str) -> bool:
        if _PLAIN.fullmatch(key):
            return _ends_with(path, key)
        return self.match(rf"(.*\.)?({key})$", path, field) is not None

    def names(self, modules: str | tuple[str, ...], path: str, field: str) -> bool:
        """Whether a regular expression or a list of names means the module at `path`."""
        if isinstance(modules, str):
            return self.match(modules, path, field, whole=True) is not None
        names = self._names.get(field)
        if names is None:
            names = self._names[field] = frozenset(modules)
        return path in names or any(path[at + 1 :] in names for at, letter in enumerate(path) if letter == ".")

    def layer_index(self, layers_pattern: tuple[str, ...], path: str) -> int | None:
        """The number of the layer that `path` lies in."""
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in layers_pattern] or [_FIRST_INDEX]
        for pattern in patterns:
            match = self.match(pattern, path, "layers_pattern")
            if match:
                index = match.groupdict().get("idx")
                return None if index is None else int(index)
        return None


def _ends_with(path: str, key: str) -> bool:
    """`(.*\\.)?(key)$` for a key of letters, digits, _, - and dots, each of which means any character."""
    start = len(path) - len(key)
    if start < 0 or (start > 0 and path[start - 1] != "."):
        return False
    tail = path[start:]
    return tail == key or all(wanted in (letter, ".") for wanted, letter in zip(key, tail, strict=True))


def _unrolled(pattern: str, field: str) -> int:
    """A bound on the items that counted repeats are unrolled into: (a?){9}b → 9·3 + 1.

    Raises MalformedAdapter for one beyond MAX_UNROLLED and for what is not read in a pattern.
    """
    if not _PRINTABLE.fullmatch(pattern):
        raise MalformedAdapter(f"{field}: {pattern[:80]!a} has characters that no module's name has", field)
    sums, last = [0], 0  # of the open groups; of the item before a repeat
    for token in _TOKENS.finditer(pattern):
        if _UNREAD.fullmatch(token[0]):
            raise MalformedAdapter(f"{field}: {token[0][:80]!r} is not read in a pattern", field)
        if token[0] == "(":
            sums.append(1)
        elif token[1] is not None:
            times = max(int(token[1] or 0), int(token[2] or 0), 1)
            sums[-1] += last * (times - 1)
            last *= times
        else:
            last = sums.pop() if token[0] == ")" and len(sums) > 1 else 1
            sums[-1] += last
        if sums[-1] > MAX_UNROLLED:
            raise MalformedAdapter(f"{field}: {pattern[:80]!r} repeats too much, write a simpler one", field)
    return sum(sums)
