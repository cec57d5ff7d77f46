"""Which network evaluations reuse deep features: DeepCache (Ma et al. 2023, arXiv 2312.00858).

Between two steps the features of a U-Net's coarse levels change little. A full evaluation keeps the
input of one block on the way up; the evaluations that follow run only the blocks outside of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CENTER_POWER = 1.4
"""The power that the authors' code uses by default."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How often and how deep features are reused."""

    interval: int
    """N of the paper's 1:N inference: one of N evaluations is full."""
    branch: int = 0
    """Skip connection inside of which features are reused, from 0, the outermost, which leaves the
    fewest blocks to run; the paper counts from 1."""
    center: int | None = None
    """Evaluation, from 0, around which full ones are densest: the paper's non-uniform schedule.
    None: equal distances."""
    power: float = CENTER_POWER
    """With `center`, how uneven the schedule is; 1: equal distances."""

    def __post_init__(self) -> None:
        if self.interval < 2:
            raise ValueError(
                f"cache must be at least 2, got {self.interval}; leave it out for full evaluations"
            )
        if self.branch < 0:
            raise ValueError(f"cache_branch must be at least 0, got {self.branch}")
        if self.center is not None and self.center < 0:
            raise ValueError(f"cache_center must be at least 0, got {self.center}")
        if not 1 <= self.power <= 10:
            raise ValueError(f"cache_power must be from 1 to 10, got {self.power}")

    def full(self, guided: Sequence[bool]) -> list[bool]:
        """Whether each row of a table is evaluated in full.

        With `center` c and `power` p, k = ceil(rows / interval) rows are full, at the integers of
        l^p + c for k values l at equal distances from (-c)^(1/p) to (rows - c)^(1/p), exclusive
        (section "Extending to 1:N Inference"), where powers keep the sign. The first row is full,
        and so is one where guidance begins, since it has no unconditional features yet.

        guided: whether each row of the table is guided.
        """
        count = len(guided)
        chosen = set(range(0, count, self.interval))
        if self.center is not None and count:
            number = -(-count // self.interval)
            first, last = (_root(end - self.center, self.power) for end in (0, count))
            marks = [first + (last - first) * index / number for index in range(number)]
            places = [_root(mark, 1 / self.power) + self.center for mark in marks]
            chosen = {0, *(min(math.floor(place + 1e-9), count - 1) for place in places)}
        begins = [now and not before for before, now in zip([True, *guided], guided, strict=False)]
        return [row in chosen or begins[row] for row in range(count)]


def _root(value: float, power: float) -> float:
    """|value|^(1 / power) with the sign of value."""
    return math.copysign(abs(value) ** (1 / power), value)
