"""What a claim consists of, and how its numbers are written."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
Tell = Callable[[int, int], None]
"""Called as tell(done, total)."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A result of a paper, and how it is measured here."""

    title: str
    """What is claimed, as a sentence."""
    paper: str
    measure: Callable[[Path, Tell], dict[str, Any]]
    """measure(runs, tell) -> numbers that JSON can store; `runs` is the folder of trained runs."""
    section: Callable[[dict[str, Any]], str]
    """What the page says of the numbers."""
    draw: Callable[[dict[str, Any], Path], None] | None = None
    """Draws the numbers into a .png file."""


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean of values, one per seed, and their standard deviation."""
    return statistics.fmean(values), statistics.stdev(values)


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """mean ± standard deviation."""
    mean, deviation = spread(values)
    return f"{mean:{form}} ± {deviation:{form}}"


def verdict(better: Sequence[float], worse: Sequence[float]) -> str:
    """Whether `better` is lower than `worse` by more than the spread of both, in a sentence.

    better, worse: one value per seed, of the same seeds.
    """
    (low, a), (high, b) = spread(better), spread(worse)
    gap, noise = high - low, max(a, b, 1e-12)
    every = all(x < y for x, y in zip(better, worse, strict=True))
    if gap > noise and every:
        return f"**Holds**: with every seed, and by {gap / noise:.1f} times the larger spread."
    if gap > 0:
        return (
            f"**Not shown**: the difference is {gap / noise:.1f} times the larger spread, "
            f"{'and has' if every else 'but does not have'} the right sign with every seed."
        )
    return "**Does not hold here.**"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, whose first column is text."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
