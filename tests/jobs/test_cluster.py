"""Two workers on Ray, one killed: it is replaced, and the bytes are those of one worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdiff.jobs import run_job
from fastdiff.jobs.cluster import Ledger
from tests.jobs.jobs import mixed_rows, spec_of, tiny_bundle
from tests.jobs.kill import content, ray_cluster, workers_of
from tests.support.imports import ROOT

LIMIT = 900.0
"""Seconds; alone it takes about twenty."""


def test_a_shard_belongs_to_one_worker_until_it_is_gone() -> None:
    ledger = Ledger()
    assert [ledger.take(0, 5), ledger.take(1, 5), ledger.take(0, 5)] == [True, False, True]
    ledger.release(1, 5)  # not its own
    assert not ledger.take(1, 5)
    ledger.drop(0)
    assert ledger.take(1, 5)
    ledger.release(1, 5)
    assert ledger.take(2, 5)


@pytest.mark.slow
def test_a_worker_on_ray_is_killed_and_the_shards_are_those_of_one_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tiny_bundle(tmp_path)
    spec = spec_of(tmp_path, mixed_rows(120, steps=(20, 40)), "whole", shard_size=6)
    run_job(spec, threads=1)
    out = tmp_path / "ray"
    words = ["generate", spec.rows, "--model", spec.model, "--out", str(out), "--device", "cpu"]
    words += ["--shard-size", "6", "--format", "webdataset", "--threads", "1", "--batch", "4"]
    words += ["--on", "ray", "--workers", "2"]
    until = time.monotonic() + LIMIT
    with ray_cluster(2) as (environment, cluster):
        process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff", *words],
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        while not content(out) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        victim = workers_of("ray", process.pid, cluster)[0]
        os.kill(victim, signal.SIGKILL)
        assert len(content(out)) < 20
        assert process.wait(until - time.monotonic()) == 0
    assert content(out) == content(spec.out)
