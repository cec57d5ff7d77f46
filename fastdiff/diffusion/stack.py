"""Arrays of rows stacked in one buffer and shared by their users."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class _Part:
    start: int
    end: int
    users: int = 0


class Stack:
    """Reference-counted arrays of rows in one buffer, each found by a key.

    Rows are looked up by index on the device, so that arrays of different lengths can serve one
    batch. If an array does not fit, the buffer grows to at least twice its size; only then does it
    move in memory.

    Attributes:
        rows: (capacity, *width), the buffer; the contents of rows outside all arrays are arbitrary.
    """

    def __init__(self, rows: Tensor | None = None, *, room: int = 0) -> None:
        """Create an empty stack.

        Args:
            rows: (capacity, *width), the initial buffer; None: allocate it for the first array.
            room: minimum capacity from the first array on.
        """
        self.rows, self._room = torch.empty(0) if rows is None else rows, room
        self._parts: dict[Hashable, _Part] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._parts

    def add(self, key: Hashable, make: Callable[[], Tensor]) -> int:
        """Start using an array, until :meth:`drop`. Returns the row of the buffer where it begins.

        make: called if the key is new; returns the array, (length, *width).
        """
        part = self._parts.get(key)
        if part is None:
            array = make()
            part = self._parts[key] = self._gap(len(array))
            if part.end > len(self.rows):
                self._grow(part.end, array)
            if len(array):
                self.rows[part.start : part.end] = array
        part.users += 1
        return part.start

    def drop(self, key: Hashable) -> None:
        """Stop using an array; call it once for each call of :meth:`add`."""
        part = self._parts[key]
        part.users -= 1
        if not part.users:
            del self._parts[key]

    def _gap(self, length: int) -> _Part:
        """The first gap that is long enough, or the space after the last array."""
        start = 0
        for part in sorted(self._parts.values(), key=lambda part: part.start):
            if part.start - start >= length:
                break
            start = max(start, part.end)
        return _Part(start, start + length)

    def _grow(self, least: int, like: Tensor) -> None:
        old = self.rows
        self.rows = like.new_zeros(max(least, 2 * len(old), self._room), *like.shape[1:])
        if len(old):
            self.rows[: len(old)] = old
