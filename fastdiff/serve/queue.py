"""Which image is next: self-clocked fair queueing (Golestani 1994, section III).

An image of cost c that arrives at virtual time v gets the tag F = max(v, F of its flow's last
image) + c / weight. The smallest tag is next, and its tag becomes the virtual time. A flow is one
client, or one request where clients are not told apart. A short image that arrives later passes the
long ones of other flows, but each passing moves the virtual time on, so that no image starves.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """A queue of items that have a flow and a cost."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable, float, Item]] = []
        self._last: dict[Hashable, float] = {}
        self._now, self._order = 0.0, count()
        self.cost = 0.0
        """Sum of the costs of all items."""

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Item]:
        return (entry[-1] for entry in self._heap)

    def add(self, item: Item, *, flow: Hashable, cost: float, weight: float = 1.0) -> None:
        """Add an item; those of one flow leave in the order in which they came.

        weight: of its flow: of two flows that always wait, one gets as much more as its weight is
        larger, and neither is ever held up for good.
        """
        tag = self._last[flow] = max(self._now, self._last.get(flow, 0.0)) + cost / weight
        heapq.heappush(self._heap, (tag, next(self._order), flow, cost, item))
        self.cost += cost

    def first(self) -> Item | None:
        """The next item, which stays in the queue; None if the queue is empty."""
        return self._heap[0][-1] if self._heap else None

    def pop(self) -> Item:
        """Take the next item out."""
        self._now, _, _, cost, item = heapq.heappop(self._heap)
        self.cost -= cost
        self._forget()
        return item

    def remove(self, leaves: Callable[[Item], bool]) -> list[Item]:
        """Take out all items for which `leaves` is true."""
        gone = [entry for entry in self._heap if leaves(entry[-1])]
        if gone:
            self._heap = [entry for entry in self._heap if not leaves(entry[-1])]
            heapq.heapify(self._heap)
            self.cost -= sum(entry[3] for entry in gone)
            for flow in {entry[2] for entry in gone}:  # nobody pays for what was not served
                self._last.pop(flow, None)
            for tag, _, flow, _, _ in self._heap:
                self._last[flow] = max(tag, self._last.get(flow, 0.0))
            self._forget()
        return [entry[-1] for entry in gone]

    def _forget(self) -> None:
        """Forget flows whose last tag has passed: they would start at the virtual time anyway."""
        if not self._heap:
            self._last.clear()
            self.cost = 0.0
        elif len(self._last) > 2 * len(self._heap) + 64:
            self._last = {flow: tag for flow, tag in self._last.items() if tag > self._now}
