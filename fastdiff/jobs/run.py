"""Run a job: `run_job`, which is also what resumes it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastdiff.checkpoint.open import open_device
from fastdiff.generate.session import Session
from fastdiff.jobs.processes import Crew, Process, Task
from fastdiff.jobs.report import write_report
from fastdiff.jobs.rows import Rows, open_rows
from fastdiff.jobs.settle import chosen_backend, session_of, settled
from fastdiff.jobs.shards import Shards
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.store import Store, has_locks
from fastdiff.jobs.worker import Begun, Counts, Worker, cpu_threads

if TYPE_CHECKING:
    from fastdiff.jobs.cluster import Cluster

TIMEOUT = 600.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a job is."""

    rows: int
    """Rows of the job, or of this share of it."""
    before: int
    """Rows that were finished before this run."""
    made: int
    """Images of this run."""
    failed: int
    """Rows of this run that have an error record."""
    busy: int
    """Slots in use, of all workers."""
    slots: int
    """Slots of all workers."""
    waiting: int
    """Shards that other processes hold."""
    memory: int
    """Bytes in use by all workers."""
    seconds: float
    """Since this run began to make images."""

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return self.made / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take; None if nothing is known yet."""
        done = self.made + self.failed
        rest = max(self.rows - self.before - done, 0)
        return rest * self.seconds / done if done else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run has done."""

    status: Status
    images: int
    """Images of all finished shards of the job."""
    errors: int
    """Rows of all finished shards that have no image; OUT/*.errors.jsonl says why."""
    shards: int
    """Shards that are finished."""
    of: int
    """Shards of the job."""
    report: str
    """Path or URL of the report, an HTML page."""


@dataclass
class _Watch:
    """Adds the counts of the workers up, and passes them on."""

    rows: int
    before: int
    listen: Callable[[Status], None]
    counts: list[Counts] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def status(self) -> Status:
        def total(name: str) -> int:
            return sum(getattr(counts, name) for counts in self.counts)

        return Status(
            rows=self.rows,
            before=self.before,
            made=total("made"),
            failed=total("failed"),
            busy=total("busy"),
            slots=total("slots"),
            waiting=max((counts.waiting for counts in self.counts), default=0),
            memory=total("memory"),
            seconds=time.monotonic() - self.since,
        )

    def tell(self, counts: Sequence[Counts]) -> None:
        self.counts = list(counts)
        self.listen(self.status())


def run_job(
    spec: JobSpec,
    *,
    workers: int = 1,
    on: Literal["local", "ray"] = "local",
    share: tuple[int, int] = (1, 1),
    batch: int | None = None,
    threads: int | None = None,
    retry_errors: bool = False,
    timeout: float = TIMEOUT,
    listen: Callable[[Status], None] = lambda status: None,
) -> Summary:
    """Make the images of a job that are not there yet.

    A shard that has its name is whole and is never made again, so running a job again resumes it,
    after any kind of end. A row that cannot be made becomes a record in ``OUT/*.errors.jsonl`` and
    stops nothing. On a CPU the shards have the same bytes however often the job was stopped, and
    for any `workers`, `share` and `batch`.

    Args:
        workers: processes on this machine, which take several GPUs in turns; with `on` "ray",
            actors with one device each, wherever the cluster has room.
        on: "ray" uses the cluster at RAY_ADDRESS, or one of this machine without it.
        share: (i, n) makes the i-th of n shares of the shards, counted from 1, for schedulers that
            start n jobs.
        batch: slots per worker; None: from the memory that is free.
        threads: CPU threads per worker; None: all, divided among the workers, or those with which
            the job began. Bits may depend on them, so they belong to the job.
        retry_errors: make the rows again that have an error record.
        timeout: seconds without progress after which one of several workers is replaced.
        listen: called with a `Status` about twice a second.

    Raises:
        ValueError: a column is unknown, a default is wrong, the folder has a job that differs (its
            input, settings, weights, versions or machine), or workers died again and again.
        FileNotFoundError: the rows or the model do not exist.
        OSError: the disk is full; nothing is half-written, and with more room the job resumes.
    """
    if workers < 1 or not 1 <= share[0] <= share[1]:
        raise ValueError(
            f"workers and share must be at least 1, and i at most n, got {workers} and {share}"
        )
    if on not in ("local", "ray"):
        raise ValueError(f"on must be 'local' or 'ray', got {on!r:.40}")
    rows = open_rows(spec.rows)
    shards = Shards.of(spec, rows.count)
    store = shards.store
    store.prepare()
    if on == "ray":
        from fastdiff.jobs.cluster import Cluster

        team: Cluster | Local = Cluster(spec, workers)
    else:
        team = Local(spec, workers)
    with team:
        mine, slots, threads = team.settle(rows, store, batch, threads)
        own = range(share[0] - 1, len(shards), share[1])
        there = [number for number in own if shards.is_finished(number)]
        retry = [n for n in there if retry_errors and store.exists(shards.errors_name(n))]
        done = sum(len(shards.range(n)) for n in there)
        again = sum(len(shards.errors(n)) for n in retry)
        watch = _Watch(sum(len(shards.range(n)) for n in own), done - again, listen)
        task = Task(
            team.spec, rows, Begun.of(mine), slots, threads, (own.start, own.step), retry, workers
        )
        team.run(task, timeout=timeout, tell=watch.tell)
        store.prepare()  # what workers that died left behind
    status = watch.status()
    report = write_report(spec, shards, status, mine)
    finished = [*shards.finished()]
    errors = sum(len(shards.errors(number)) for number in finished)
    images = sum(len(shards.range(number)) for number in finished) - errors
    return Summary(
        status=status,
        images=images,
        errors=errors,
        shards=len(finished),
        of=len(shards),
        report=report,
    )


class Local:
    """Workers on this machine: one in this process, or several processes."""

    def __init__(self, spec: JobSpec, workers: int) -> None:
        if spec.device == "auto":
            spec = replace(spec, device="cuda" if torch.cuda.is_available() else "cpu")
        self.spec, self.workers = spec, workers
        self._session: Session | None = None

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None

    def settle(
        self, rows: Rows, store: Store, batch: int | None, threads: int | None
    ) -> tuple[dict[str, Any], int, int | None]:
        """As `settled`."""
        spec, device = self.spec, open_device(self.spec.device)
        with chosen_backend(spec):
            # workers load the model themselves, so here a copy in main memory tells what it is
            session = session_of(spec, device if self.workers == 1 else torch.device("cpu"))
            if self.workers == 1:
                self._session = session
            return settled(spec, rows, session, store, device, self.workers, batch, threads)

    def run(self, task: Task, *, timeout: float, tell: Callable[[Sequence[Counts]], None]) -> None:
        """Make all shards of a task."""
        if self._session is None:
            task = replace(task, locks=_share_by_locks(Shards.of(task.spec, 1).store))
            Crew(task, Process, timeout=timeout, tell=tell).run()
            return
        worker = Worker(
            task.spec,
            task.rows,
            self._session,
            task.begun,
            task.slots,
            tell=lambda counts: tell([counts]),
            share=task.share,
            retry=frozenset(task.retry),
        )
        with chosen_backend(task.spec), cpu_threads(task.threads):
            worker.run()


def _share_by_locks(store: Store) -> bool:
    """Whether workers can share shards by locks; says so if they cannot.

    Raises:
        ValueError: other processes do not see the store.
    """
    if store.place.startswith("memory://"):
        raise ValueError(f"{store.place} is seen by one process only; use --workers 1")
    if store.folder is not None and has_locks(store.folder):
        return True
    warnings.warn(
        f"{store.place} has no locks, so each worker gets a fixed share of the shards; if the same "
        "job runs elsewhere at the same time, give each run a share (--shard I/N), or it makes the "
        "same shards again",
        stacklevel=2,
    )
    return False


def share_of_environment(environment: dict[str, str] | None = None) -> tuple[int, int] | None:
    """(i, n), counted from 1, of RANK and WORLD_SIZE, which torchrun sets; None without them.

    Raises:
        ValueError: they are no numbers that belong together.
    """
    given = os.environ if environment is None else environment
    rank, size = given.get("RANK"), given.get("WORLD_SIZE")
    if rank is None or size is None:
        return None
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1, got {rank!r} and {size!r}")
    return int(rank) + 1, int(size)
