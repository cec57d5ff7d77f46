"""Several workers: one that dies or hangs is replaced; the bytes are those of one worker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastdiff.jobs import JobSpec, Status, run_job, settle
from fastdiff.jobs.store import Store
from tests.jobs.jobs import content, mixed_rows, spec_of, tiny_bundle
from tests.support.imports import ROOT

ROWS = mixed_rows(60, steps=(2, 4, 8))
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("jobs")
    tiny_bundle(folder)
    spec = spec_of(folder, ROWS, "whole", shard_size=5)
    run_job(spec, threads=1)
    return spec


def children() -> list[int]:
    """The processes that this one has started and that are still running."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def once(due: Callable[[], bool], act: Callable[[], None]) -> Iterator[list[str]]:
    """Do something as soon as it is due; yields what has been done."""
    done: list[str] = []

    def watch() -> None:
        until = time.monotonic() + 120
        while not due() and time.monotonic() < until:
            time.sleep(0.01)
        act()
        done.append("done")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield done
    thread.join()


def test_two_workers_make_the_same_bytes(whole: JobSpec) -> None:
    spec, heard = replace(whole, out=whole.out.parent / "two"), list[Status]()
    summary = run_job(spec, workers=2, threads=1, listen=heard.append)
    assert (summary.images, summary.shards, summary.status.made) == (60, 12, 60)
    assert content(spec.out) == content(whole.out)
    assert not children()
    assert heard[-1].slots == 128


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_replaced(
    whole: JobSpec, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdiff.jobs.processes.START", 60.0)  # it may hang before it tells
    spec = replace(whole, out=whole.out.parent / how.name)

    def is_at_work() -> bool:
        return any((spec.out / ".claims").glob("*.lock")) and len(children()) == 2

    with once(is_at_work, lambda: os.kill(children()[0], how)) as done:
        summary = run_job(spec, workers=2, threads=1, timeout=20)
    assert done
    assert (summary.images, summary.errors, summary.status.failed) == (60, 0, 0)
    assert content(spec.out) == content(whole.out)
    assert not children()


def test_a_worker_that_dies_again_and_again_ends_the_job(
    whole: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(whole.out.parent)
    package = whole.out.parent / "fastdiff"
    (package / "jobs").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "jobs" / "__init__.py").touch()
    (package / "jobs" / "processes.py").write_text("raise SystemExit(7)")
    spec = replace(whole, out=whole.out.parent / "dies")
    with pytest.raises(ValueError, match="ended with exit code 7, 3 times without finishing"):
        run_job(spec, workers=2, threads=1)


def test_the_error_of_a_worker_is_that_of_the_job(
    whole: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(whole, out=whole.out.parent / "refused")
    read = Path(whole.rows).read_text()
    gone = whole.out.parent / "gone.jsonl"
    gone.write_text(read)
    begin = settle.begin

    def then_remove(store: Store, mine: dict[str, object]) -> bool:
        begun: bool = begin(store, mine)
        gone.unlink()
        return begun

    monkeypatch.setattr(settle, "begin", then_remove)
    with pytest.raises(OSError, match=r"No such file or directory: .*gone.jsonl"):
        run_job(replace(spec, rows=str(gone)), workers=2, threads=1)
    assert not children()


def test_workers_end_with_their_parent(whole: JobSpec) -> None:
    """Killed in the middle of the job, with two workers; then the job goes on with one."""
    out = whole.out.parent / "orphans"
    words = ["generate", whole.rows, "--model", whole.model, "--out", str(out), "--device", "cpu"]
    words += ["--shard-size", "5", "--format", "webdataset", "--threads", "1", "--workers", "2"]
    parent = subprocess.Popen([sys.executable, "-m", "fastdiff", *words], cwd=ROOT)
    until = time.monotonic() + 120
    while not [*out.glob(".claims/*.lock")] and time.monotonic() < until:
        time.sleep(0.01)
    workers = [
        int(pid)
        for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    ]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.01)
    spec = replace(whole, out=out)
    assert not spec.out.joinpath("000011.tar").exists()
    run_job(spec, threads=1)
    assert content(out) == content(whole.out)
