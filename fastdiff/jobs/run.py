"""Run a job: `run_job`, which is also what resumes it."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastdiff.checkpoint.open import load, open_device
from fastdiff.generate.facts import default_batch
from fastdiff.generate.job import Job
from fastdiff.generate.memory import Call, need_of
from fastdiff.generate.session import Session
from fastdiff.jobs.fingerprint import begin, check_same, fingerprint, read_fingerprint
from fastdiff.jobs.pictures import write_pictures
from fastdiff.jobs.processes import Crew, Task
from fastdiff.jobs.report import write_report
from fastdiff.jobs.rows import Rows, open_rows
from fastdiff.jobs.shards import Shards
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.store import Store, has_locks
from fastdiff.jobs.worker import Begun, Counts, Worker, builder_of, cpu_threads
from fastdiff.kernels import backend
from fastdiff.kernels.choose import selected_backend
from fastdiff.memory import free_memory

TRIED = 1000
"""Rows that are read to find the first that is right."""
MOST_SLOTS = 256
FULL = 0.85
"""Part of the free memory of a GPU that slots may take."""
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
        workers: processes on this machine; on several GPUs they take them in turns.
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
    rows = open_rows(spec.rows)
    shards = Shards.of(spec, rows.count)
    store = shards.store
    store.prepare()
    if spec.device == "auto":
        spec = replace(spec, device="cuda" if torch.cuda.is_available() else "cpu")
    device = open_device(spec.device)
    with backend(selected_backend() if spec.backend == "auto" else spec.backend):
        # workers load the model themselves, so here a copy in main memory tells what it is
        session = _session(spec, device if workers == 1 else torch.device("cpu"))
        mine, slots, threads = _settled(spec, rows, session, store, device, workers, batch, threads)
        begun = Begun.of(mine)
        own = range(share[0] - 1, len(shards), share[1])
        there = [number for number in own if shards.is_finished(number)]
        retry = [n for n in there if retry_errors and store.exists(shards.errors_name(n))]
        done = sum(len(shards.range(n)) for n in there)
        again = sum(len(shards.errors(n)) for n in retry)
        watch = _Watch(sum(len(shards.range(n)) for n in own), done - again, listen)
        if workers == 1:
            worker = Worker(
                spec,
                rows,
                session,
                begun,
                slots,
                tell=lambda counts: watch.tell([counts]),
                share=(own.start, own.step),
                retry=frozenset(retry),
            )
            with cpu_threads(threads):
                worker.run()
        else:
            del session
            ranges, locks = (own.start, own.step), _share_by_locks(store)
            task = Task(spec, rows, begun, slots, threads, ranges, retry, workers, locks)
            Crew(task, timeout=timeout, tell=watch.tell).run()
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


def _settled(
    spec: JobSpec,
    rows: Rows,
    session: Session,
    store: Store,
    device: torch.device,
    workers: int,
    batch: int | None,
    threads: int | None,
) -> tuple[dict[str, Any], int, int | None]:
    """Begin the job, or check that it is the one that was begun: its fingerprint, slots, threads.

    Of processes that begin at the same instant one writes the fingerprint; the others then take its
    choices, as if they had resumed it.
    """
    on_cpu, first = device.type == "cpu", _first_job(spec, rows, session)
    while True:
        before = read_fingerprint(store)
        known = {} if before is None else before.get("compute", {})
        slots = batch or known.get("slots") or _slots(session, first, device)
        count = (threads or known.get("threads") or _threads(workers)) if on_cpu else None
        if before is None:
            pictures = write_pictures(store, rows, builder_of(spec, rows, session))
        else:
            pictures = before.get("pictures")
        mine = fingerprint(
            spec,
            rows,
            session.model,
            device=device,
            slots=None if on_cpu else slots,
            threads=count,
            pictures=pictures,
        )
        if before is not None:
            check_same(store, before, mine)
            return before, slots, count
        if begin(store, mine):
            return mine, slots, count


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


def _session(spec: JobSpec, device: torch.device) -> Session:
    dtype = getattr(torch, spec.dtype)
    return Session.of(load(spec.model, device=device, dtype=dtype, options=spec.load))


def _first_job(spec: JobSpec, rows: Rows, session: Session) -> Job | None:
    """Check columns, mappings and defaults; return the job of the first row that is right.

    Raises:
        ValueError: a column, a mapping or a default is wrong.
    """
    build = builder_of(spec, rows, session)
    columns = rows.columns
    if columns is not None:
        build.columns.check(columns, session.facts)
    for row in rows.read():
        if columns is None and row.error is None:
            for column in row.values:  # later rows with other columns get a record
                build.columns.fields(column, session.facts)
            columns = tuple(row.values)
        try:
            return build(row)
        except (ValueError, OSError):
            if row.number >= TRIED:
                return None
    return None


def _threads(workers: int) -> int:
    return max(torch.get_num_threads() // workers, 1)


def _slots(session: Session, job: Job | None, device: torch.device) -> int:
    """Slots by memory: on a GPU the largest power of two that fits, on a CPU the default."""
    facts = session.facts
    height, width = (
        getattr(job, "height", None) or facts.image_size or 0,
        getattr(job, "width", None) or facts.image_size or 0,
    )
    default = default_batch(
        max(height // facts.factor, 1), max(width // facts.factor, 1), text=facts.reads_text
    )
    free = None if device.type == "cpu" or job is None else free_memory(device)
    if free is None:
        return default
    assert job is not None
    slots = MOST_SLOTS
    while slots > 1:
        call = Call(device=device, dtype=session.dtype, count=slots, batch=slots, conditions=slots)
        loaded = session.device == device  # with several workers each loads it
        if need_of([session.model], job, call, loaded=loaded).total <= FULL * free:
            break
        slots //= 2
    return slots


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
