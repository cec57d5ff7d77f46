"""The memory of a job does not grow with its rows."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support.imports import ROOT

ALLOWED = 12 * 2**20
"""Bytes that ten times the rows may add: the allocator's arenas fill in the first thousands."""


def peak(rows: int) -> int:
    command = [sys.executable, "-m", "tests.jobs.dry_run", "--rows", str(rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = re.search(rf"^{rows} images, peak (\d+) bytes", done.stdout, re.M)
    assert found is not None, done.stdout
    return int(found[1])


@pytest.mark.slow
def test_ten_times_the_rows_take_the_same_memory() -> None:
    """`python -m tests.jobs.dry_run --rows 1000000` is the same with more rows."""
    assert peak(20_000) - peak(2_000) < ALLOWED
