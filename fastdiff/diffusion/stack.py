"""Arrays of rows stacked in one buffer, each shared by those who use it."""

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
    """Arrays of rows in one buffer, found by a key and dropped when nobody uses them any more.

    Rows are looked up by index on the device, so arrays of different lengths serve one batch. The
    buffer grows when an array does not fit, to at least twice its size; then, and only then, it
    moves in memory.

    Attributes:
        rows: (capacity, *width), the buffer; rows that belong to no array hold anything.
    """

    def __init__(self, rows: Tensor | None = None, *, room: int = 0) -> None:
        """
        rows: (capacity, *width), the buffer to begin with; None: like the first array.
        room: rows that there is room for from the first array on.
        """
        self.rows, self._room = torch.empty(0) if rows is None else rows, room
        self._parts: dict[Hashable, _Part] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._parts

    def add(self, key: Hashable, make: Callable[[], Tensor]) -> int:
        """Use an array until :meth:`drop`. Returns the buffer's row where it begins.

        make: called for (length, *width) where the key is new.
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
        """Use an array no longer; one call for each of :meth:`add`."""
        part = self._parts[key]
        part.users -= 1
        if not part.users:
            del self._parts[key]

    def _gap(self, length: int) -> _Part:
        """The first gap that is long enough, or the place behind all arrays."""
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
