"""The CPU time of tests is measured, and tests that take too much fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.costs import Costs, cpu_seconds

SUITE = """
import subprocess
import sys
import time

import pytest

BURN = "import time\\nend = time.process_time() + 0.3\\nwhile time.process_time() < end: pass"


def test_waits(): time.sleep(0.4)


def test_burns(): exec(BURN)


def test_burns_in_a_child(): subprocess.run([sys.executable, "-c", BURN], check=True)


@pytest.mark.slow
def test_is_marked(): exec(BURN)


@pytest.fixture
def costly(): exec(BURN)


def test_has_a_costly_fixture(costly): pass


@pytest.mark.parametrize("n", range(2))
def test_of_two(n): exec(BURN)
"""


def test_cpu_time_counts_children_once_they_are_waited_for() -> None:
    start = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert cpu_seconds() - start > 0.05


def test_a_test_that_costs_too_much_fails_unless_marked_slow(tmp_path: Path) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    costs, failed = Costs(limit=0.25), []

    class Outcomes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                failed.append(report.nodeid.partition("::")[2])
                assert "s of CPU time, the limit is 0.25 s; make it smaller" in report.longreprtext

    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path)]
    pytest.main([*options, str(suite)], plugins=[costs, Outcomes()])
    assert failed == ["test_burns", "test_burns_in_a_child", "test_of_two[0]", "test_of_two[1]"]
    assert costs.functions["test_suite.py::test_waits"] < 0.1
    assert costs.functions["test_suite.py::test_has_a_costly_fixture"] > 0.25
    assert costs.functions["test_suite.py::test_of_two"] > 0.5
    assert costs.files["test_suite.py"] > 1.5
