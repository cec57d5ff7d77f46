"""Time several functions in turns, and say which differences are larger than the noise.

Other work on a machine, its clock and its temperature change within seconds, and with them all
timings. Functions that take turns meet the same conditions, so their ratio is steadier than any of
their times. The order is drawn anew for each round. One function takes part twice, under two names:
the ratio of the two (A/A) is noise, and no difference within it counts.

    with a, b the seconds per round:   ratio = exp(median(log(b / a)))

The interval of a ratio is the one between order statistics of the rounds' ratios that contains the
median with probability `CONFIDENCE`, whatever their distribution (Conover 1999, Practical
Nonparametric Statistics, section 3.2).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from fastdiff.bench.clock import Method, TurnTimer

CONFIDENCE = 0.999
LEAST_ROUNDS = 11
"""With fewer rounds not even their smallest and largest ratio are an interval of `CONFIDENCE`."""
MOST_ROUNDS = 200
LEAST_NOISE = 0.01
"""The noise floor is never below this: memory addresses alone make such differences."""
AGAIN = " again"
"""Ends the name of the function that takes part twice."""

Verdict = Literal["faster", "slower", "equal", "unsure"]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one function is as another, with an interval."""

    value: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """The ratio theirs / ours of seconds that were measured in the same rounds."""
        logs = sorted(math.log(b / a) for a, b in zip(ours, theirs, strict=True))
        skipped = _skipped(len(logs))
        low, high = logs[skipped], logs[-1 - skipped]
        return cls(math.exp(median(logs)), math.exp(low), math.exp(high), len(logs))

    def verdict(self, noise: float) -> Verdict:
        """ "faster" or "slower" if the whole interval is beyond the noise, "equal" if all of it is
        within, else "unsure".

        noise: the floor, as a share: 0.02 for 2%.
        """
        if self.rounds < LEAST_ROUNDS:
            return "unsure"
        if self.low > 1 + noise:
            return "faster"
        if self.high < 1 / (1 + noise):
            return "slower"
        within = self.low >= 1 / (1 + noise) and self.high <= 1 + noise
        return "equal" if within else "unsure"


def _skipped(rounds: int) -> int:
    """How many ratios may be left out at each end of the interval of a median."""
    outside, skipped = 2.0 * 0.5**rounds, 0
    weight = 0.5**rounds
    while skipped < (rounds - 1) // 2:
        weight *= (rounds - skipped) / (skipped + 1)  # binomial(rounds, skipped + 1) / 2^rounds
        if outside + 2 * weight > 1 - CONFIDENCE:
            break
        outside += 2 * weight
        skipped += 1
    return skipped


def noise_floor(one: Sequence[float], again: Sequence[float]) -> float:
    """The share by which two timings of one function in the same rounds differ, at least
    `LEAST_NOISE`. A difference must exceed it with its whole interval, which allows for scatter;
    the floor allows for what stays the same in all rounds, such as addresses."""
    value = Ratio.of(one, again).value
    return max(LEAST_NOISE, value - 1, 1 / value - 1)


def in_turns(
    functions: Mapping[str, Callable[[], Any]],
    timer: TurnTimer,
    *,
    method: Method = "events",
    budget_s: float = 1.0,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
    within: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
    before: Callable[[int], Any] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds per call of each function in each round.

    Args:
        functions: name -> what to call; they are warmed up first.
        budget_s: seconds for all timed rounds together; `least` rounds take place anyway, and no
            more than `most`.
        within: name -> the context in which its function is warmed up and timed.
        before: called with the number of the round before it, to change the operands; then each
            function is called only once per round, so that none can repeat an earlier result.
        seed: of the orders.
    """
    order = random.Random(seed)
    rounds = {}
    for name, function in functions.items():
        with within(name):
            rounds[name] = timer.prepared(function, method=method, single=before is not None)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(rounds)
    end = time.perf_counter() + budget_s
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        if before is not None:
            before(number)
        order.shuffle(names)
        for name in names:
            with within(name):
                seconds[name].append(rounds[name]())
    return seconds
