"""What became slower between two runs of `fastdiff bench`.

The same code differs from itself by more than the rounds of one process show: addresses and pages
differ between processes, and what else a machine does differs between moments. Both runs therefore
repeat their rows in fresh processes (`fastdiff.bench.repeats`), and each process counts as one
observation: y = log(seconds of eager PyTorch / seconds of the provider), in turns. The interval of
a change is Yuen's, with 10% of the processes trimmed at each end (Yuen 1974, Biometrika 61, 165):

    mean_t(y after) - mean_t(y before)  ±  t(df) * sqrt(d before + d after)
    d = (n - 1) * winsorized variance / (h (h - 1)),   h = n - 2 * trimmed

All intervals of a comparison hold together with probability `CONFIDENCE` (Bonferroni). A change
counts if its whole interval is beyond a margin: 3%, and at least half of what the machine changed
in the time of eager PyTorch, whose code is the same in both runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

from fastdiff.bench.result import CPU_TIME, Repeated, Run
from fastdiff.bench.turns import Ratio, Verdict

IDENTITY = ("device", "cores", "threads", "driver", "torch")
"""Facts of the environment in which two runs must agree to be compared."""
CONFIDENCE = 0.99
"""That no interval of a comparison misses."""
MARGIN = 0.03
"""Smaller changes are not worth a failed CI."""
DRIFT_SHARE = 0.5
"""The part of the machine's own change in the time of eager PyTorch that the margin contains."""
VISIBLE = 0.10
"""A change that a comparison must be able to see before it says that there is none."""
TRIMMED = 0.1
LEAST = 5
"""Processes that an interval needs."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One provider of one row in two runs, by one clock."""

    row: str
    provider: str
    clock: str
    speedup: Ratio
    """After against before: below 1, it became slower. `rounds` counts processes."""
    margin: float

    @property
    def verdict(self) -> Verdict:
        """ "equal" if a change of `VISIBLE` would have been seen, "unsure" if it might not have."""
        ratio = self.speedup
        if ratio.low > 1 + self.margin:
            return "faster"
        if ratio.high < 1 / (1 + self.margin):
            return "slower"
        seen = ratio.low > 1 / (1 + VISIBLE) and ratio.high < 1 + VISIBLE
        return "equal" if seen and self.margin < VISIBLE else "unsure"

    @property
    def processes_needed(self) -> int | None:
        """About how many processes per run would show a change of `VISIBLE`; None: no number."""
        room = math.log1p(VISIBLE) - math.log1p(self.margin)
        width = math.log(self.speedup.high / self.speedup.low) / 2 if self.speedup.low else math.inf
        if room <= 0 or not math.isfinite(width):
            return None
        return max(2 * LEAST, math.ceil(self.speedup.rounds * (width / room) ** 2))


def compare(before: Run, after: Run) -> list[Change]:
    """Every provider of ours in the rows that both runs have repeated.

    Raises:
        ValueError: the runs are of different devices or releases of PyTorch, were not repeated, or
            have no row in common.
    """
    for fact in IDENTITY:
        pair = before.environment.get(fact), after.environment.get(fact)
        if pair[0] != pair[1]:
            raise ValueError(
                f"the runs differ in {fact}: {pair[0]!r} and {pair[1]!r}; compare runs of one "
                "machine with the same number of threads and the same PyTorch"
            )
    for name, run in (("first", before), ("second", after)):
        if not run.repeats:
            raise ValueError(
                f"the {name} run was measured in one process only, which says nothing about what "
                "other processes do; measure it again with --json and without --repeat 0"
            )
    return changes(before.repeats, after.repeats, threads=before.environment.get("threads"))


def changes(
    before: Sequence[Repeated],
    after: Sequence[Repeated],
    *,
    threads: int | None,
    paired: bool = False,
) -> list[Change]:
    """The changes of all rows that both sides have, one per provider.

    With one thread, CPU time is what a call costs, and other work on the machine hardly disturbs
    it; the clock on the wall only adds slow-downs that CPU time does not contain (sleeping, waiting
    for a device). With several threads it is the other way round.

    Args:
        paired: process i of both sides ran one right after the other, so that the machine was the
            same for both.

    Raises:
        ValueError: no row in common.
    """
    known = {(one.key, one.provider, one.clock): one for one in before}
    pairs = [
        (known[key], one) for one in after if (key := (one.key, one.provider, one.clock)) in known
    ]
    if not pairs:
        raise ValueError("the runs have no row in common; measure both with the same options")
    level = (1 - CONFIDENCE) / len(pairs)
    grouped: dict[tuple[object, str], list[Change]] = {}
    for old, new in pairs:
        change = Change(
            row=new.row,
            provider=new.provider,
            clock=new.clock,
            speedup=_speedup(old.speed, new.speed, level, paired),
            margin=max(MARGIN, math.expm1(DRIFT_SHARE * _drift(old.eager, new.eager))),
        )
        grouped.setdefault((new.key, new.provider), []).append(change)
    return [_decisive(found, threads) for found in grouped.values()]


def _decisive(found: Sequence[Change], threads: int | None) -> Change:
    """The clock that found a slow-down; else the one that says most about these threads."""
    ordered = sorted(found, key=lambda change: (change.clock == CPU_TIME) != (threads == 1))
    slower = [change for change in ordered if change.verdict == "slower"]
    return (slower or ordered)[0]


@dataclass(frozen=True)
class _Mean:
    """A trimmed mean, its squared standard error, and the degrees of freedom of that."""

    value: float
    squared: float
    freedom: int

    @classmethod
    def of(cls, values: Sequence[float]) -> _Mean:
        ordered, count = sorted(values), len(values)
        cut = int(TRIMMED * count)
        kept = ordered[cut : count - cut]
        winsorized = [kept[0]] * cut + kept + [kept[-1]] * cut
        squared = (count - 1) * variance(winsorized) / (len(kept) * (len(kept) - 1))
        return cls(fmean(kept), squared, len(kept) - 1)


def _speedup(old: Sequence[float], new: Sequence[float], level: float, paired: bool) -> Ratio:
    """exp of the difference of means, with an interval of confidence 1 - level."""
    count = min(len(old), len(new))
    if count < LEAST:
        return Ratio(math.exp(fmean(new) - fmean(old)), 0.0, math.inf, count)
    if paired:
        mean = _Mean.of([b - a for a, b in zip(old, new, strict=False)])
        value, squared, freedom = mean.value, mean.squared, mean.freedom
    else:
        a, b = _Mean.of(old), _Mean.of(new)
        value, squared = b.value - a.value, a.squared + b.squared
        parts = a.squared**2 / a.freedom + b.squared**2 / b.freedom  # Welch and Satterthwaite
        freedom = int(squared**2 / parts) if parts else min(a.freedom, b.freedom)
    half = student_t(level, freedom) * math.sqrt(squared)
    return Ratio(math.exp(value), math.exp(value - half), math.exp(value + half), count)


def _drift(old: Sequence[float], new: Sequence[float]) -> float:
    """The change of log seconds of eager PyTorch, in size."""
    return abs(median(new) - median(old))


def student_t(level: float, freedom: int) -> float:
    """The t with P(|T| > t) = level for Student's distribution.

    By bisection of the finite series of its distribution function for whole degrees of freedom
    (Abramowitz and Stegun 1964, equations 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _outside(high, freedom) > level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, freedom) > level else (low, middle)
    return high


def _outside(t: float, freedom: int) -> float:
    """P(|T| > t)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)
