"""A cache of the values that were used most recently."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

Made = TypeVar("Made")


class Kept:
    """Up to `count` values by key; the least recently used are dropped."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: dict[Hashable, object] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The value of a key, made if it is not there."""
        value: Made = self._values.pop(key) if key in self._values else make()  # type: ignore[assignment]
        self._values[key] = value
        if len(self._values) > self._count:
            del self._values[next(iter(self._values))]
        return value
