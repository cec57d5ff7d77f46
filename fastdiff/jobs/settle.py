"""What a job settles when it begins: fingerprint, slots, threads; compared when it is resumed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fastdiff.checkpoint.open import load
from fastdiff.generate.facts import default_batch
from fastdiff.generate.job import Job
from fastdiff.generate.memory import Call, need_of
from fastdiff.generate.session import Session
from fastdiff.jobs.fingerprint import begin, check_same, fingerprint, read_fingerprint
from fastdiff.jobs.pictures import write_pictures
from fastdiff.jobs.rows import Rows
from fastdiff.jobs.spec import JobSpec
from fastdiff.jobs.store import Store
from fastdiff.jobs.worker import builder_of
from fastdiff.kernels import backend
from fastdiff.kernels.choose import selected_backend
from fastdiff.memory import free_memory

TRIED = 1000
"""Rows that are read to find the first that is right."""
MOST_SLOTS = 256
FULL = 0.85
"""Part of the free memory of a GPU that slots may take."""


def chosen_backend(spec: JobSpec) -> contextlib.AbstractContextManager[None]:
    return backend(selected_backend() if spec.backend == "auto" else spec.backend)


def session_of(spec: JobSpec, device: torch.device) -> Session:
    dtype = getattr(torch, spec.dtype)
    return Session.of(load(spec.model, device=device, dtype=dtype, options=spec.load))


def settled(
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

    Args:
        session: of the model, on any device. device: that of the workers, of which there are
            `workers` on one machine.
        batch, threads: what the user asked for.

    Raises:
        ValueError: a column, a mapping or a default is wrong, or the job that was begun differs.
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
