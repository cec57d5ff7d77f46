"""Jobs of mixed settings keep the network's blocks full; batches of equal settings do not.

Counted in a run: the rows that the network evaluates, with the padding of its blocks, against the
rows that the samplers' tables need (two where a row is guided).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from torch import Tensor

from fastdiff.generate.facts import check
from fastdiff.generate.job import ClassJob, Job, SampleSettings
from fastdiff.generate.run import stream
from fastdiff.generate.session import Session
from fastdiff.runtime.denoiser import Batch, Denoiser
from tests.jobs.jobs import mixed_rows
from tests.support.tiny import UNET as CONFIG
from tests.support.tiny import tiny_pixel_model, tiny_unet

SLOTS = 64
STEPS = (10, 20, 30, 40, 50)


@pytest.fixture(scope="module")
def session() -> Session:
    unet = tiny_unet(replace(CONFIG, in_channels=1, out_channels=1))
    return Session.of(tiny_pixel_model(denoiser=unet, image_channels=1, image_size=8))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each evaluation of a network that returns zeros."""
    counted: list[int] = []

    def evaluate(_: Denoiser, x: Tensor, batch: Batch, *_inputs: Any) -> Tensor:
        counted.append(batch.rows)
        return x.new_zeros(batch.rows, *x.shape[1:])

    monkeypatch.setattr(Denoiser, "__call__", evaluate)
    return counted


def mixed_jobs(count: int, session: Session) -> list[Job]:
    jobs = []
    for seed, row in enumerate(mixed_rows(count, steps=STEPS)):
        settings = {key: value for key, value in row.items() if key != "label"}
        scale = float(settings.pop("guidance_scale"))
        made = ClassJob(seed=seed, settings=SampleSettings(**settings, guidance_scale=scale))
        jobs.append(check(made, session.facts))
    return jobs


def needed(jobs: Iterable[Job], session: Session) -> int:
    """One row per row of a sampler's table, two where it is guided."""
    return sum(sum(1 + guided for guided in session.table(job.settings).guided) for job in jobs)


def run(session: Session, jobs: Sequence[Job]) -> None:
    def fail(number: int, error: Exception) -> NoReturn:
        raise error

    results = stream(session.model, iter(jobs), on_failure=fail, batch=SLOTS)
    assert len([*results]) == len(jobs)


def test_mixed_jobs_take_hardly_more_than_they_need(session: Session, rows: list[int]) -> None:
    jobs = mixed_jobs(500, session)
    run(session, jobs)
    need = needed(jobs, session)
    assert need <= sum(rows) <= 1.05 * need


def test_batches_of_equal_settings_take_far_more(session: Session, rows: list[int]) -> None:
    """As many requests at a time, but only those with equal settings share a batch."""
    jobs = mixed_jobs(SLOTS, session)
    groups: dict[SampleSettings, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.settings].append(job)
    assert len(groups) > 10
    for group in groups.values():
        run(session, group)
    assert sum(rows) >= 1.5 * needed(jobs, session)
