"""Shortcuts for tests that generate: from jobs to a tensor of latents or of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.generate.facts import check
from fastdiff.generate.job import ClassJob, Job, TextJob
from fastdiff.generate.run import generate, plan
from fastdiff.generate.session import Session
from fastdiff.runtime.run import run


def images(model: Model, jobs: Sequence[Job], **options: Any) -> Tensor:
    """(N, C, H, W), in the order of the jobs."""
    return torch.stack([result.image for result in generate(model, jobs, **options)])


def latents(
    model: Model, jobs: Sequence[Job], *, slots: int = 64, refiner: Model | None = None
) -> Tensor:
    """(N, C, h, w), the latents that are decoded or passed to the refiner."""
    session = Session.of(model)
    second = None if refiner is None else Session.of(refiner)
    passes = [plan(session, check(job, session.facts), second) for job in jobs]
    out = [now.x for now in passes]
    requests = [
        replace(now.request, tag=number)
        for number, now in enumerate(passes)
        if now.request is not None
    ]
    for result in run(session.network, requests, slots=slots):
        out[result.request.tag] = result.x
    assert all(x is not None for x in out)
    return torch.stack([x for x in out if x is not None])


def class_jobs(classes: Sequence[Any], seeds: Sequence[int], settings: Any) -> list[Job]:
    """A job per class and seed."""
    return [
        ClassJob(label=label, seed=seed, settings=settings)
        for label, seed in zip(classes, seeds, strict=True)
    ]


def text_jobs(prompts: str | Sequence[str], seeds: Sequence[int], **options: Any) -> list[Job]:
    """A job per seed, all with one prompt or each with its own."""
    each = [prompts] * len(seeds) if isinstance(prompts, str) else prompts
    return [
        TextJob(prompt=prompt, seed=seed, **options)
        for prompt, seed in zip(each, seeds, strict=True)
    ]
