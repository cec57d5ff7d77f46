"""Rows once more in fresh processes: what they measure, and what they do when they fail."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fastdiff.bench import repeats
from fastdiff.bench.plan import Plan
from fastdiff.bench.record import ROOT
from fastdiff.bench.repeats import Program, Todo, gathered, measured, passed, repeat
from fastdiff.bench.result import CPU_TIME, TIME, Entry, Row, Run
from fastdiff.bench.user import user_kernel

SMALL = Plan(quick=True, ops=("geglu",), shape=(1, 16, 64), threads=1)
CPU = torch.device("cpu")


def row(name: str) -> Row:
    return Row(kind="op", name=name, job="", shape="", dtype="float32", method="host")


def working(seconds: float) -> Callable[[], None]:
    def work() -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    return work


def todo(name: str, **functions: Callable[[], None]) -> Todo:
    return Todo(row(name), "host", lambda: functions, lambda _: nullcontext())


def test_both_clocks_measure_the_ratio() -> None:
    """Ours works half as long as eager, and then sleeps, which is no CPU time."""
    work, eager = working(1e-3), working(2e-3)

    def ours() -> None:
        work()
        time.sleep(3e-3)

    found = list(measured([todo("a", eager=eager, cpu=ours)], CPU, quick=True, seed=0))
    speed = {one["clock"]: one["speed"] for one in found}
    assert speed.keys() == {TIME, CPU_TIME}
    assert speed[CPU_TIME] == pytest.approx(math.log(2), abs=0.25)
    assert speed[TIME] < 0  # at least 4 ms against 2 ms, however busy the machine is


def test_rows_come_in_an_order_of_the_seed_until_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repeats, "ROW_S", {True: 0.0})
    rows = [todo(name, eager=working(1e-4), cpu=working(1e-4)) for name in "abcdef"]

    def order(seed: int) -> list[str]:
        found = measured(rows, CPU, quick=True, seed=seed)
        return list(dict.fromkeys(one["key"][1] for one in found))

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == list("abcdef")
    monkeypatch.setattr(repeats, "PROCESS_S", {True: 1e-9})
    assert len(order(0)) == 0


def test_processes_answer_in_their_order() -> None:
    def answer(speed: float, clock: str = TIME) -> dict[str, object]:
        return {
            "key": ["op", "a"], "row": "a", "provider": "cpu", "clock": clock, "speed": speed,
            "eager": -speed,
        }  # fmt: skip

    found = gathered([[answer(0.1), answer(5.0, CPU_TIME)], [], [answer(0.2)]])
    by_clock = {one.clock: one for one in found}
    assert by_clock[TIME].speed == (0.1, 0.2)
    assert by_clock[TIME].eager == (-0.1, -0.2)
    assert by_clock[CPU_TIME].speed == (5.0,)
    assert by_clock[TIME].key == ("op", "a")


def test_refused_providers_are_not_repeated() -> None:
    good, bad = Entry(provider="cpu", median_s=1.0), Entry(provider="mine:f", note="refused: it")
    one = Row(**{**row("a").__dict__, "entries": (good, bad)})
    found = gathered([[
        {"key": one.key, "row": "a", "provider": name, "clock": TIME, "speed": 0, "eager": 0}
        for name in ("cpu", "mine:f", "other")
    ]])  # fmt: skip
    assert [r.provider for r in passed(found, Run(environment={}, rows=(one,)))] == ["cpu"]


def test_another_checkout_takes_turns_and_a_users_kernel_takes_part(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import fastdiff, torch.nn.functional as F\n"
        "print(fastdiff.__file__)\n"  # output of a kernel disturbs nothing
        "def often(x):\n"
        "    a, b = x.chunk(2, dim=-1)\n"
        "    for _ in range(20):\n"
        "        a * F.gelu(b)\n"
        "    return a * F.gelu(b)\n"
    )
    kernel = user_kernel(f"{path}:often", "geglu")
    asked = []
    pair = repeat(
        SMALL,
        [Program.of(ROOT), Program()],
        kernel=kernel,
        processes=1,
        progress=lambda done, total: asked.append((done, total)),
    )
    assert asked == [(0, 2), (1, 2), (2, 2)]
    for found in pair:
        assert {(one.provider, one.clock) for one in found} == {
            (name, clock) for name in ("cpu", "mine:often") for clock in (TIME, CPU_TIME)
        }
        assert {one.row for one in found} == {"geglu (1, 16, 64)"}
        slower = next(r for r in found if r.provider == "mine:often" and r.clock == CPU_TIME)
        assert slower.speed[0] < math.log(0.3)  # it works 21 times as much


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    kernel = tmp_path / "fails.py"
    kernel.write_text("import os\ndef f(x):\n    os._exit(3)\n")
    with pytest.raises(RuntimeError, match="exited with code 3"):
        repeat(SMALL, [Program()], kernel=user_kernel(f"{kernel}:f", "geglu"), processes=1)
    with pytest.raises(RuntimeError, match="No module named nothing_here"):
        Program(module="nothing_here")({})


def test_places_of_other_versions(tmp_path: Path) -> None:
    assert Program.of(Path(sys.executable)).python == sys.executable
    assert Program.of(ROOT).first == str(ROOT)
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="--against must be a checkout of fastdiff"):
            Program.of(place)
