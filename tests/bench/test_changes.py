"""What `--compare` and `--against` say of two runs: intervals over processes, margins, clocks."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import scipy.stats

from fastdiff.bench import changes
from fastdiff.bench.changes import Change, compare, student_t
from fastdiff.bench.result import CPU_TIME, TIME, Repeated, Run
from fastdiff.bench.turns import Ratio

FACTS = {"device": "a CPU", "cores": 2, "threads": 1, "driver": "", "torch": "2.13.0"}
OPS = ("geglu", "layer_norm", "attention")


def run(
    seed: int,
    slower: dict[str, float] | None = None,
    *,
    spread: float = 0.02,
    pace: float = 1.0,
    processes: int = 10,
    clock: str = CPU_TIME,
) -> Run:
    """A run of made-up rows, twice as fast as eager PyTorch.

    Args:
        slower: op -> factor on our time.
        spread: standard deviation between processes.
        pace: factor on the time of everything.
    """
    draw = random.Random(seed)
    repeats = [
        Repeated(
            key=("op", op, "a", "(2, 8)", "float32"),
            row=f"{op} a (2, 8)",
            provider="cpu",
            clock=clock,
            speed=tuple(
                math.log(2 / (slower or {}).get(op, 1.0)) + draw.gauss(0, spread)
                for _ in range(processes)
            ),
            eager=tuple(math.log(pace) + draw.gauss(0, 0.02) for _ in range(processes)),
        )
        for op in OPS
    ]
    return Run(environment=FACTS, repeats=tuple(repeats))


def verdicts(found: Sequence[Change]) -> dict[str, str]:
    return {change.row.split()[0]: change.verdict for change in found}


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12, 33])
@pytest.mark.parametrize("level", [0.2, 0.05, 1e-3, 1e-5])
def test_students_quantiles(level: float, freedom: int) -> None:
    expected = scipy.stats.t.isf(level / 2, freedom)
    assert student_t(level, freedom) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("before", "after"), [(5, 5), (10, 10), (10, 14), (23, 8)])
def test_the_interval_is_yuens(before: int, after: int) -> None:
    """At either end of the interval, scipy's trimmed test has about the interval's level."""
    draw = random.Random(before)
    old = [draw.gauss(0, 0.02) for _ in range(before)]
    new = [draw.gauss(0.1, 0.05) for _ in range(after)]
    ratio = changes._speedup(old, new, 0.01, paired=False)
    for end in (ratio.low, ratio.high):
        moved = [value + math.log(end) for value in old]
        test = scipy.stats.ttest_ind(new, moved, equal_var=False, trim=changes.TRIMMED)
        assert 0.004 < test.pvalue <= 0.0101  # ours rounds the degrees of freedom down


def test_the_paired_interval_is_students() -> None:
    """Five pairs: none is trimmed."""
    old, new = [0.1, 0.5, 0.3, 0.9, 0.2], [0.2, 0.62, 0.37, 1.01, 0.31]
    ratio = changes._speedup(old, new, 0.01, paired=True)
    test = scipy.stats.ttest_rel(new, old).confidence_interval(0.99)
    assert (math.log(ratio.low), math.log(ratio.high)) == pytest.approx(tuple(test), rel=1e-6)


def test_a_slow_down_of_a_tenth_is_found_and_nothing_else() -> None:
    expected = {"geglu": "slower", "layer_norm": "equal", "attention": "equal"}
    for seed in range(50):
        assert verdicts(compare(run(seed), run(100 + seed, {"geglu": 1.1}))) == expected


def test_the_other_way_it_became_faster() -> None:
    found = compare(run(0, {"geglu": 1.3}), run(1))
    assert verdicts(found)["geglu"] == "faster"
    assert found[0].speedup.value == pytest.approx(1.3, rel=0.03)


@pytest.mark.parametrize("spread", [0.005, 0.03, 0.1, 0.4])
def test_the_same_code_is_never_called_different(spread: float) -> None:
    """600 rows at each spread between processes, also where all of them are noisy."""
    seen = Counter(
        change.verdict
        for seed in range(200)
        for change in compare(run(seed, spread=spread), run(1000 + seed, spread=spread))
    )
    assert seen["slower"] + seen["faster"] <= 1


def test_noise_that_hides_a_tenth_is_said_and_not_called_equal() -> None:
    found = [
        change
        for seed in range(100)
        for change in compare(
            run(seed, spread=0.15), run(1000 + seed, dict.fromkeys(OPS, 1.1), spread=0.15)
        )
    ]
    seen = Counter(change.verdict for change in found)
    assert seen["unsure"] > 280
    assert seen["equal"] == 0
    needed = [change.processes_needed for change in found if change.verdict == "unsure"]
    assert min(n for n in needed if n is not None) > 10


def test_what_is_needed_is_enough() -> None:
    """With as many processes as the advice says, a tenth is found."""
    noisy = compare(run(0, spread=0.06), run(1, {"geglu": 1.1}, spread=0.06))
    needed = max(change.processes_needed or 0 for change in noisy)
    options = {"spread": 0.06, "processes": needed}
    found = [verdicts(compare(run(s, **options), run(99 + s, {"geglu": 1.1}, **options)))
             for s in range(10)]  # fmt: skip
    assert sum(one["geglu"] == "slower" for one in found) >= 8


def test_one_strange_process_does_not_hide_a_slow_down() -> None:
    before, after = run(0), run(1, {"geglu": 1.1})
    odd = replace(before.repeats[0], speed=(2.5, *before.repeats[0].speed[1:]))
    found = compare(replace(before, repeats=(odd, *before.repeats[1:])), after)
    assert verdicts(found)["geglu"] == "slower"


def test_a_machine_that_changed_is_not_blamed_on_the_code() -> None:
    """Eager PyTorch itself took 1.4 times as long in the second run."""
    found = compare(run(0), run(1, {"geglu": 1.1}, pace=1.4))
    assert found[0].margin == pytest.approx(math.sqrt(1.4) - 1, abs=0.03)
    assert set(verdicts(found).values()) == {"unsure"}
    assert {change.processes_needed for change in found} == {None}


def test_turns_see_through_a_machine_that_changes() -> None:
    """Both sides of a pair meet the same moment, which changes from pair to pair."""
    moments = [random.Random(i).gauss(0, 0.3) for i in range(10)]

    def met(one: Run) -> tuple[Repeated, ...]:
        return tuple(
            replace(row, speed=tuple(s + m for s, m in zip(row.speed, moments, strict=True)))
            for row in one.repeats
        )

    before, after = met(run(0)), met(run(1, {"geglu": 1.1}))
    paired = changes.changes(before, after, threads=1, paired=True)
    assert verdicts(paired)["geglu"] == "slower"
    assert verdicts(changes.changes(before, after, threads=1))["geglu"] == "unsure"


def both_clocks(time_slower: float, cpu_slower: float, spread: float) -> tuple[Run, Run]:
    def one(seed: int, time: float, cpu: float) -> Run:
        by_time = run(seed, {"geglu": time}, spread=spread, clock=TIME)
        return replace(by_time, repeats=by_time.repeats + run(seed, {"geglu": cpu}).repeats)

    return one(0, 1.0, 1.0), one(1, time_slower, cpu_slower)


def test_either_clock_finds_a_slow_down() -> None:
    waiting = compare(*both_clocks(1.2, 1.0, 0.02))
    assert (waiting[0].clock, waiting[0].verdict) == (TIME, "slower")
    working = compare(*both_clocks(1.2, 1.2, 0.3))
    assert (working[0].clock, working[0].verdict) == (CPU_TIME, "slower")


@pytest.mark.parametrize(("threads", "clock"), [(1, CPU_TIME), (2, TIME)])
def test_without_a_slow_down_the_clock_goes_by_the_threads(threads: int, clock: str) -> None:
    before, after = both_clocks(1.0, 1.0, 0.02)
    found = changes.changes(before.repeats, after.repeats, threads=threads)
    assert {change.clock for change in found} == {clock}
    assert len(found) == len(OPS)


@pytest.mark.parametrize("fact", changes.IDENTITY)
def test_runs_of_different_machines_do_not_compare(fact: str) -> None:
    other = replace(run(1), environment={**FACTS, fact: "another"})
    with pytest.raises(ValueError, match=f"the runs differ in {fact}"):
        compare(run(0), other)


def test_runs_that_cannot_be_compared() -> None:
    once = replace(run(1), repeats=())
    with pytest.raises(ValueError, match=r"the second run was measured in one process.*--json"):
        compare(run(0), once)
    with pytest.raises(ValueError, match="the first run"):
        compare(once, run(0))
    other = replace(run(1), repeats=(replace(run(1).repeats[0], provider="triton"),))
    with pytest.raises(ValueError, match="no row in common"):
        compare(run(0), other)


def test_too_few_processes_are_no_interval() -> None:
    found = compare(run(0, processes=4), run(1, {"geglu": 5.0}, processes=4))
    assert set(verdicts(found).values()) == {"unsure"}


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.80, 0.96, 0.03, "slower"),
        (0.80, 0.98, 0.03, "unsure"),
        (0.92, 0.99, 0.03, "equal"),
        (0.97, 1.08, 0.03, "equal"),
        (0.97, 1.11, 0.03, "unsure"),
        (1.04, 1.30, 0.03, "faster"),
        (1.04, 1.09, 0.15, "unsure"),
    ],
)
def test_verdicts(low: float, high: float, margin: float, verdict: str) -> None:
    ratio = Ratio(math.sqrt(low * high), low, high, 10)
    change = Change(row="", provider="", clock=TIME, speedup=ratio, margin=margin)
    assert change.verdict == verdict
