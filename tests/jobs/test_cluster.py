"""A job past one process that its parent starts: on Ray, with torchrun. Workers die on the way.

`python -m tests.jobs.kill` does the same with more kills, more workers and a real model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.jobs import JobSpec, run_job
from fastdiff.jobs.cluster import Ledger
from tests.jobs.jobs import mixed_rows, spec_of, tiny_bundle
from tests.jobs.kill import command, content, end_session, ray_cluster, workers_of
from tests.support.imports import ROOT

ROWS = mixed_rows(240, steps=(8, 16, 24))
SHARD = 10
LASTS = 120.0
"""Seconds after which a job counts as hanging."""


def test_a_shard_belongs_to_one_worker_until_it_is_gone() -> None:
    ledger = Ledger()
    assert [ledger.take(0, 5), ledger.take(1, 5), ledger.take(0, 5)] == [True, False, True]
    ledger.release(1, 5)  # not its own
    assert not ledger.take(1, 5)
    ledger.drop(0)
    assert ledger.take(1, 5)
    ledger.release(1, 5)
    assert ledger.take(2, 5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """A job that one worker has made."""
    folder = tmp_path_factory.mktemp("jobs")
    tiny_bundle(folder)
    spec = spec_of(folder, ROWS, "alone", shard_size=SHARD)
    run_job(spec, threads=1)
    return spec


def started(on: str, spec: JobSpec, out: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command with two workers."""
    words = command(on, 2, Path(spec.rows), out, SHARD, str(spec.model))
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def killed_midway(
    process: subprocess.Popen[bytes], out: Path, workers: Callable[[], list[int]]
) -> int:
    """Kill one of two workers after the first shard. Returns how many shards were there."""
    until = time.monotonic() + LASTS
    while not (content(out) and len(pids := workers()) == 2):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(pids[0], signal.SIGKILL)
    return len(content(out))


@pytest.mark.slow
def test_on_ray_a_worker_that_is_killed_is_replaced(alone: JobSpec) -> None:
    pytest.importorskip("ray")
    out = alone.out.parent / "ray"
    with ray_cluster(2) as (environment, cluster):
        process = started("ray", alone, out, **environment)
        try:
            there = killed_midway(process, out, lambda: workers_of("ray", process.pid, cluster))
            assert process.wait(LASTS) == 0
        finally:
            end_session(process.pid)
            process.wait()
    assert there < len(ROWS) // SHARD
    assert content(out) == content(alone.out)


@pytest.mark.slow
def test_with_torchrun_a_job_goes_on_after_a_rank_was_killed(alone: JobSpec) -> None:
    """torchrun ends when a rank dies; the same command then makes the shards that are missing."""
    out = alone.out.parent / "torchrun"
    process = started("torchrun", alone, out)
    try:
        there = killed_midway(process, out, lambda: workers_of("torchrun", process.pid, None))
        assert process.wait(LASTS) != 0
    finally:
        end_session(process.pid)
        process.wait()
    assert there < len(ROWS) // SHARD
    before = content(out)
    again = started("torchrun", alone, out)
    assert again.wait(LASTS) == 0
    assert content(out) == content(alone.out)
    assert before.items() <= content(out).items()
