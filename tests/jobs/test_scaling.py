"""The simulator of docs/scaling.md: network rows as in a run, times as in closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.scaling import (
    CPU,
    DIGITS,
    PAGE,
    Fleet,
    efficiency,
    network_rows,
    page,
    seconds_of,
    static_rows,
)
from fastdiff.generate.job import Job
from fastdiff.generate.session import Session
from tests.jobs import test_slots_are_full as engine

session = engine.session
rows = engine.rows
BLOCK = 16
"""Of samples of 8 x 8 on a CPU."""


def requests(jobs: list[Job], session: Session) -> Iterator[list[int]]:
    return ([1 + guided for guided in session.table(job.settings).guided] for job in jobs)


def test_mixed_rows_agree_with_a_run(session: Session, rows: list[int]) -> None:
    jobs = engine.mixed_jobs(100, session)
    engine.run(session, jobs)
    simulated = network_rows(requests(jobs, session), engine.SLOTS, BLOCK)
    assert simulated == pytest.approx(sum(rows), rel=0.05)


def test_static_rows_agree_with_a_run(session: Session, rows: list[int]) -> None:
    jobs = engine.mixed_jobs(24, session)
    for key in dict.fromkeys(job.settings for job in jobs):
        engine.run(session, [job for job in jobs if job.settings == key])
    simulated = static_rows(requests(jobs, session), [job.settings for job in jobs], BLOCK)
    assert simulated == pytest.approx(sum(rows), rel=0.05)


def test_what_the_holds_ask_of_500_mixed_jobs(session: Session) -> None:
    jobs = engine.mixed_jobs(500, session)
    tables = [*requests(jobs, session)]
    need = sum(map(sum, tables))
    assert need <= network_rows(tables, engine.SLOTS, BLOCK) <= 1.05 * need
    few = tables[: engine.SLOTS]
    settings = [job.settings for job in jobs[: engine.SLOTS]]
    assert static_rows(few, settings, BLOCK) >= 1.5 * sum(map(sum, few))


def test_eight_workers_are_as_fast_as_eight_times_one() -> None:
    one = seconds_of(CPU, DIGITS, 20)
    for count in range(2, 9):
        assert one / seconds_of(replace(CPU, workers=count), DIGITS, 20) / count >= 0.97


def test_closed_forms() -> None:
    fleet = Fleet(workers=4, rate=10, slots=20, start=0, image_bytes=0, bandwidth=1, put=0)
    assert seconds_of(fleet, 400, 10) == pytest.approx(400 / 40 + 20 / 10)
    assert seconds_of(fleet, 10, 10) == pytest.approx(1 + 2)  # one shard, three workers idle
    limited = replace(fleet, image_bytes=1.0, bandwidth=20)  # the store takes 20 images a second
    assert seconds_of(limited, 400, 10) == pytest.approx(400 / 20 + 1 + 2)
    late = replace(fleet, start=100.0)
    assert efficiency(late, 400, 10) < 0.12


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
