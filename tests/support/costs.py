"""The CPU time of tests. The summary of a run lists it, and a test that takes too long without the
marker slow fails.

CPU time rather than wall time, because a busy machine takes longer but hardly computes more. The
CPU time of child processes counts once the test has waited for them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

SLOW = 5.0
"""Seconds of CPU time from which a test should be marked slow."""
LIMIT = 12 * SLOW
"""Seconds from which a test without the marker fails. A slower machine can cost a factor of four,
and the first test in a process that needs a large package pays for its import."""
BUDGET = 30.0
"""Minutes for the whole suite."""
LISTED = 60.0
"""Seconds from which a run lists the costs of its tests."""


def cpu_seconds() -> float:
    """User and system time of this process and of all children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Costs:
    """A pytest plugin. In a run with parallel processes each process has one, and that of the main
    process sums up the reports of all."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self._phase = 0.0
        self.files: dict[str, float] = defaultdict(float)
        self.functions: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        return (yield from self._timed())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        return (yield from self._timed())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Iterator[None]:
        return (yield from self._timed())

    def _timed(self) -> Iterator[None]:
        start = cpu_seconds()
        try:
            return (yield)
        finally:
            self._phase = cpu_seconds() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[Any]:
        report = yield
        report.cpu_seconds = self._phase  # sent along with the report to the main process
        too_long = call.when == "call" and report.passed and self._phase > self.limit
        if too_long and item.get_closest_marker("slow") is None:
            report.outcome = "failed"
            report.longrepr = (
                f"{self._phase:.1f} s of CPU time, the limit is {self.limit:g} s; make it smaller, "
                f"split it, or mark it slow (from {SLOW:g} s on)"
            )
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = getattr(report, "cpu_seconds", 0.0)
        file, _, name = report.nodeid.partition("::")
        self.files[file] += seconds
        self.functions[f"{file}::{name.partition('[')[0]}"] += seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        total = sum(self.files.values())
        if total < LISTED:
            return
        terminalreporter.section("CPU time")
        for costs, count in ((self.files, 20), (self.functions, 40)):
            costliest = sorted(costs, key=lambda name: -costs[name])[:count]
            for name in costliest:
                terminalreporter.line(f"{costs[name]:7.1f} s  {name}")
            terminalreporter.line("")
        terminalreporter.line(f"{total / 60:.1f} minutes in tests; the whole suite has {BUDGET:g}")
