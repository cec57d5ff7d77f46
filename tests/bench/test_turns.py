"""Timing in turns: intervals of known confidence, the noise floor, verdicts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest

from fastdiff.bench import turns
from fastdiff.bench.clock import HostTimer
from fastdiff.bench.turns import Ratio, in_turns, noise_floor


def binomial_confidence(rounds: int, skipped: int) -> float:
    """The probability that the median lies between the order statistics left at both ends."""
    outside = sum(math.comb(rounds, k) for k in range(skipped + 1)) / 2**rounds
    return 1 - 2 * outside


@pytest.mark.parametrize("rounds", [11, 12, 25, 60, 200, 1000])
def test_the_interval_has_the_smallest_width_of_its_confidence(rounds: int) -> None:
    ordered = [float(i + 1) for i in range(rounds)]
    ratio = Ratio.of([1.0] * rounds, ordered)
    skipped = round(ratio.low) - 1
    assert binomial_confidence(rounds, skipped) >= turns.CONFIDENCE
    assert binomial_confidence(rounds, skipped + 1) < turns.CONFIDENCE
    assert round(ratio.high) == rounds - skipped
    assert binomial_confidence(turns.LEAST_ROUNDS, 0) >= turns.CONFIDENCE
    assert binomial_confidence(turns.LEAST_ROUNDS - 1, 0) < turns.CONFIDENCE


def test_a_ratio_is_paired() -> None:
    """A machine that becomes ten times slower halfway changes the times, not the ratio."""
    pace = [1.0] * 10 + [10.0] * 10
    ours, theirs = [2.0 * p for p in pace], [3.0 * p for p in pace]
    ratio = Ratio.of(ours, theirs)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_equal_functions_are_never_called_different() -> None:
    """2,000 comparisons of log-normal times with 20% scatter: two false ones are expected at a
    confidence of 99.9% without the noise floor, and fewer with it."""
    draw = random.Random(0)

    def seconds() -> list[float]:
        return [draw.lognormvariate(0, 0.2) for _ in range(40)]

    verdicts = [Ratio.of(seconds(), seconds()).verdict(0.01) for _ in range(2000)]
    assert sum(v in ("faster", "slower") for v in verdicts) <= 5
    slower = [Ratio.of([1.1 * s for s in seconds()], seconds()) for _ in range(50)]
    assert all(r.value < 1.05 for r in slower)


def test_verdicts() -> None:
    assert Ratio(1.2, 1.1, 1.3, 50).verdict(0.05) == "faster"
    assert Ratio(1.2, 1.1, 1.3, 50).verdict(0.15) == "unsure"
    assert Ratio(0.8, 0.7, 0.9, 50).verdict(0.05) == "slower"
    assert Ratio(1.0, 0.99, 1.01, 50).verdict(0.02) == "equal"
    assert Ratio(9.0, 8.0, 10.0, turns.LEAST_ROUNDS - 1).verdict(0.01) == "unsure"


def test_the_floor_is_the_difference_that_remains() -> None:
    assert noise_floor([1.0] * 20, [1.07] * 20) == pytest.approx(0.07)
    assert noise_floor([1.07] * 20, [1.0] * 20) == pytest.approx(0.07)
    assert noise_floor([1.0] * 20, [1.0] * 20) == turns.LEAST_NOISE


def test_functions_take_turns_in_their_contexts() -> None:
    log: list[str] = []
    inside: list[str] = []

    @contextmanager
    def within(name: str) -> Any:
        inside.append(name)
        yield
        inside.pop()

    def called(name: str) -> Callable[[], None]:
        def call() -> None:
            assert inside == [name]
            log.append(name)

        return call

    functions = {name: called(name) for name in "abc"}
    seconds = in_turns(
        functions,
        HostTimer(),
        budget_s=0,
        within=within,
        before=lambda number: log.append(f"round {number}"),
    )
    assert {len(s) for s in seconds.values()} == {turns.LEAST_ROUNDS}
    text = " ".join(log[3:])  # after the warm-up
    rounds = text.split("round ")[1:]
    assert [entry.split()[0] for entry in rounds] == [str(i) for i in range(turns.LEAST_ROUNDS)]
    orders = {"".join(entry.split()[1:]) for entry in rounds}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1  # drawn anew


def test_short_calls_are_repeated_unless_operands_change() -> None:
    count = [0]

    def call() -> None:
        count[0] += 1

    HostTimer().prepared(call)()
    assert count[0] > 100
    count[0] = 0
    HostTimer().prepared(call, single=True)()
    assert count[0] == 2  # a warm-up and the round
