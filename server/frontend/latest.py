"""A value that tasks can watch; a slow watcher sees the last value, not every one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """`value` now, and `watch` for what comes. One event loop."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._changed = asyncio.Event()

    @property
    def value(self) -> T:
        return self._value

    def set(self, value: T) -> None:
        if value != self._value:
            self._value = value
            self._changed.set()
            self._changed = asyncio.Event()

    async def watch(self) -> AsyncGenerator[T, None]:
        """The value now, then the value after each change. Never ends by itself."""
        while True:
            changed = self._changed
            yield self._value
            await changed.wait()
