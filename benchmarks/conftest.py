"""Options of the benchmarks: which providers run, and whether to save the records."""

from __future__ import annotations

import pytest

from benchmarks import harness
from fastdiff.bench.record import save_records


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-records",
        action="store_true",
        help="write the timings to benchmarks/results/<device>/<commit>.json",
    )
    parser.addoption(
        "--providers",
        default=",".join(p for p in harness.PROVIDERS if p != "compile"),
        help="comma-separated; compile takes minutes and is off by default (default: %(default)s)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--providers").split(",")
    if unknown := set(chosen) - set(harness.PROVIDERS):
        raise pytest.UsageError(
            f"--providers must be some of {','.join(harness.PROVIDERS)}, got {','.join(unknown)}"
        )
    dropped = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("provider", chosen[0]) not in chosen
    ]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def pytest_sessionfinish(session: pytest.Session) -> None:
    measured = harness.RECORDS, harness.SHARES, harness.PEAKS
    if session.config.getoption("--save-records") and any(measured):
        print(f"\nrecords: {save_records(*measured)}")
