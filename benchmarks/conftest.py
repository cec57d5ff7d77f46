"""Saves the records of a run when asked to."""

from __future__ import annotations

import pytest

from benchmarks import harness


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-records",
        action="store_true",
        help="write the timings to benchmarks/results/<device>/<commit>.json",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--save-records") and harness.RECORDS:
        print(f"\nrecords: {harness.save_records(harness.RECORDS)}")
